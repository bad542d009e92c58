"""The one table of spec options, in canonical order.

These rows define parsing, printing, contradictions, caveats, ``kl-plugins explain`` and ``list``, docs/specs.md, and
the specs that the tests draw. A new option is one row here and one attribute of :class:`~kl_plugins.spec.KLSpec`. The
computation of each option is in :mod:`kl_plugins.kernels.sampled` and :mod:`kl_plugins.corrections`. Rules about
several parts of a spec are in :mod:`kl_plugins.spec.rules` and :mod:`kl_plugins.spec.target`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kl_plugins.estimators import find_estimator
from kl_plugins.spec.grammar import DEFAULT_BOUND, DEFAULT_DRAWS, DEFAULT_TOP, format_number
from kl_plugins.spec.option_row import NOT_IN_REWARD, Fault, OptionRow, Reference, Values, number, words
from kl_plugins.spec.schedules import SCHEDULE
from kl_plugins.spec.weight_options import WEIGHT_OPTIONS

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec

BIASED = "biased"
"""The only value of ``allow:``."""

ALLOW_BIASED = f"allow:{BIASED}"
"""The option that a spec needs if its target is ``none``."""


def _top_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.estimator != "exact":
        yield "'top' chooses how much of the vocabulary exact sums over", "exact@<placement>/top:<k>"


def _draws_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.top is None:
        yield "'draws' are tokens outside those of top:", "exact@<placement>/top:<k>/draws:<m>"


def _nothing_exact(spec: KLSpec) -> Iterator[Fault]:
    yield (
        "exact@advantage means a sampled own term and an exact future one; here nothing exact is left",
        "exact@advantage, or k1@advantage with this option",
    )


def _horizon_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.estimator == "exact" and spec.placement == "advantage" and spec.horizon == "token":
        yield from _nothing_exact(spec)


def _default_horizon(spec: KLSpec) -> str:
    return "sequence" if spec.placement == "advantage" else "token"


def _horizon_caveat(spec: KLSpec) -> str:
    if spec.horizon == "token" and spec.target != "none":
        return "token horizon leaves out the future-KL term: how today's token changes tomorrow's states"
    return ""


def _is_f_divergence(spec: KLSpec) -> bool:
    row = find_estimator(spec.estimator)
    return row is not None and row.is_f_divergence


def _default_future(spec: KLSpec) -> str | None:
    if spec.horizon == "token":
        return None
    if _is_f_divergence(spec):
        return "own"
    return "exact" if spec.estimator == "exact" else "k1"


def _without_future(spec: KLSpec, name: str) -> Iterator[Fault]:
    if spec.horizon == "token":
        yield f"{name!r} belongs to the future-KL term, which horizon:token leaves out", "horizon:sequence"


def _future_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.estimator == "exact" and spec.placement == "advantage" and spec.future != "exact":
        yield from _nothing_exact(spec)
    yield from _without_future(spec, "future")
    if spec.future == "own" and not _is_f_divergence(spec):
        yield f"future:own is for f-divergences; {spec.estimator} is none", "k1, k3 or exact"
    if _is_f_divergence(spec) and spec.future != "own":
        yield f"the future term of {spec.estimator} is f(delta_j)", "future:own (the default)"


def _future_caveat(spec: KLSpec) -> str:
    if spec.placement == "advantage" and spec.horizon == "sequence" and spec.future == "k3":
        return "a k3 future term has the same mean as k1, less variance near the reference, a heavy tail far from it"
    return ""


def _beta_source(spec: KLSpec) -> Reference:
    if spec.beta is not None and spec.beta.kind == "adaptive":
        return "arXiv 1909.08593, section 2.2", "the adaptive controller"
    return None


def _read_allow(text: str) -> bool:
    words({BIASED: ""}).read(text)
    return True


def _allow_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.target != "none":
        yield f"not needed: this spec estimates {spec.target}", f"the spec without {ALLOW_BIASED}"


OPTIONS: dict[str, OptionRow] = {
    row.name: row
    for row in (
        OptionRow(
            "top",
            number(
                "<k>",
                lambda k: (
                    f"the reference's {float(k):.0f} most probable tokens and one bucket for all others exactly, "
                    "what happens inside the bucket by an unbiased sample"
                ),
                {"1": "1.0", "20": "20", "1e3": "1000"},
                expected="a whole number >= 1",
                holds=lambda x: x >= 1 and x == int(x),
                of=int,
                bare={"top": DEFAULT_TOP, "draws": DEFAULT_DRAWS},
            ),
            "exact only: the reference's k most probable tokens and one bucket for all others exactly, what happens "
            "inside the bucket by an unbiased sample; top without a number means "
            f"top:{DEFAULT_TOP}/draws:{DEFAULT_DRAWS}",
            faults=_top_faults,
            acts=lambda spec: spec.estimator == "exact",
            unset=("all", "the whole vocabulary exactly"),
        ),
        OptionRow(
            "draws",
            number(
                "<m>",
                lambda m: (
                    f"the reference draws {float(m):.0f} more tokens in each state, which take most of the noise away "
                    "that is left inside the bucket"
                ),
                {"1": "1.0", "8": "8", "16": "16.0"},
                expected="a whole number >= 1",
                holds=lambda x: x >= 1 and x == int(x),
                of=int,
            ),
            "with top: only: the reference draws m more tokens from its tail in each state; they and the drawn token "
            "estimate together what happens inside the bucket, with less noise and without bias",
            faults=_draws_faults,
            acts=lambda spec: spec.top is not None,
            unset=("none", "the drawn token alone says what happens inside the bucket"),
        ),
        OptionRow(
            "horizon",
            words(
                {
                    "token": "each token's own divergence; what it does to later states is left out",
                    "sequence": "adds the future-KL term: what a token does to the states after it",
                }
            ),
            "sequence adds the future-KL term: what a token does to the states after it",
            places=NOT_IN_REWARD,
            default=_default_horizon,
            faults=_horizon_faults,
            acts=lambda spec: spec.placement != "reward",
            caveat=_horizon_caveat,
        ),
        OptionRow(
            "future",
            words(
                {
                    "k1": "future terms are log-ratios u_j",
                    "k3": "future terms are k3_j: same mean, less variance near the reference, a heavy tail far from "
                    "it",
                    "exact": "future terms are full-vocabulary KLs: the least variance",
                    "own": "future terms are f(delta_j) of the divergence itself",
                }
            ),
            "estimator of the future term; own is f(delta) of an f-divergence",
            places=NOT_IN_REWARD,
            default=_default_future,
            faults=_future_faults,
            acts=lambda spec: spec.horizon == "sequence",
            caveat=_future_caveat,
        ),
        OptionRow(
            "gamma",
            number(
                "<0..1>",
                lambda g: "later tokens count in full" if g == "1" else f"a token k steps later counts {g}^k",
                {"0": "0.0", "0.5": ".5", "1": "1.0"},
                expected="a number in [0, 1]",
                holds=lambda x: x <= 1,
            ),
            "discount of the future term per response token; default 1",
            places=NOT_IN_REWARD,
            faults=lambda spec: _without_future(spec, "gamma"),
            acts=lambda spec: spec.horizon == "sequence",
            caveat="gamma < 1 discounts the future KL: lower variance, biased towards the token-local gradient",
            bends=True,
            on_policy="gamma discounts the future terms, which moves it towards the token-local gradient",
        ),
        *WEIGHT_OPTIONS,
        OptionRow(
            "bound",
            number(
                "<x>",
                lambda x: f"log-ratios are held within +-{x} nats inside an exp",
                {"1e-3": "0.001", "30": "30.0", "50": "50", "1e3": "1000"},
            ),
            f"largest |log-ratio| inside an exp, nats; default {format_number(DEFAULT_BOUND)}; gradients stay alive "
            "beyond it",
            acts=lambda _: True,
        ),
        OptionRow(
            "beta",
            SCHEDULE,
            "control of beta over the run, with its state in the checkpoint; unset: the host's constant",
            acts=lambda _: True,
            unset=("constant", "the host's own beta, constant"),
            source=_beta_source,
        ),
        OptionRow(
            "allow",
            Values(
                BIASED,
                _read_allow,
                lambda _: BIASED,
                lambda _: "accepts that the expected gradient is that of no divergence",
                forms=(BIASED,),
                examples=((BIASED, BIASED, True),),
            ),
            "required exactly where the target is none: you know that no divergence is estimated",
            attribute="allow_biased",
            faults=_allow_faults,
        ),
    )
}
"""Every option by name, in the order of the canonical text."""

BY_SPELLING: dict[str, OptionRow] = {name: row for row in OPTIONS.values() for name in (row.name, *row.other_names)}
"""Every option by each of its accepted spellings."""
