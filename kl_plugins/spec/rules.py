"""Contradictions: combinations of valid parts that mean nothing, each refused with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from kl_plugins.estimators import find_estimator
from kl_plugins.spec.errors import KLSpecError

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec

WEIGHT_OPTIONS = ("cap", "band", "norm")
LOSS_ONLY = ("is", "behaviour", *WEIGHT_OPTIONS, "clip")
FUTURE_ONLY = ("future", "gamma")


class HasPosition(Protocol):
    """Where a part stands in the text."""

    @property
    def start(self) -> int:
        """Index of the first character."""

    @property
    def end(self) -> int:
        """Index behind the last character."""


def default_horizon(placement: str) -> str:
    """``sequence`` for advantage (FRPO), ``token`` elsewhere."""
    return "sequence" if placement == "advantage" else "token"


def default_future(estimator: str, horizon: str) -> str | None:
    """The future term where the spec names none: f(delta_j) for f-divergences, exact for exact, else k1."""
    if horizon == "token":
        return None
    row = find_estimator(estimator)
    if row is not None and row.is_f_divergence:
        return "own"
    return "exact" if estimator == "exact" else "k1"


def check(text: str, spec: KLSpec, parts: Mapping[str, HasPosition]) -> None:
    """Raise :class:`KLSpecError` at the first contradiction.

    Args:
        text: the whole spec.
        spec: what its parts say.
        parts: the options the user wrote, by name.
    """
    for name, problem, expected in _contradictions(spec, parts):
        part = parts.get(name)
        start, end = (part.start, part.end) if part else (0, len(text))
        raise KLSpecError(text, start, end, problem, expected)


def _contradictions(spec: KLSpec, parts: Mapping[str, HasPosition]) -> Iterator[tuple[str, str, str]]:
    yield from _placement_rules(spec, parts)
    yield from _exact_rules(spec, parts)
    yield from _horizon_rules(spec, parts)
    yield from _weight_rules(spec, parts)
    yield from _bias_rules(spec)


def _placement_rules(spec: KLSpec, parts: Mapping[str, HasPosition]) -> Iterator[tuple[str, str, str]]:
    if spec.placement != "loss":
        for name in LOSS_ONLY:
            if name in parts:
                yield (
                    name,
                    f"{name!r} has no meaning for @{spec.placement}: the host weights the whole policy-gradient term",
                    f"{name!r} only with @loss",
                )
    if spec.placement == "reward":
        for name in ("horizon", *FUTURE_ONLY):
            if name in parts:
                yield (
                    name,
                    f"{name!r} has no meaning for @reward: the host's return decides how far a reward reaches",
                    "@advantage or @loss with this option, or @reward without it",
                )


def _exact_rules(spec: KLSpec, parts: Mapping[str, HasPosition]) -> Iterator[tuple[str, str, str]]:
    if spec.top is not None and spec.estimator != "exact":
        yield "top", "'top' chooses how much of the vocabulary exact sums over", "exact@<placement>/top:<k>"
    if spec.estimator != "exact":
        return
    if spec.placement == "reward":
        yield (
            "",
            "exact@reward regularises nothing: KL_t is constant given the state, so as a score it cancels",
            "exact@loss, or exact@advantage (sampled own term, exact future)",
        )
    if spec.placement == "advantage" and spec.future != "exact":
        yield (
            "horizon" if spec.horizon == "token" else "future",
            "exact@advantage means a sampled own term and an exact future one; here nothing exact is left",
            "exact@advantage, or k1@advantage with this option",
        )
    if spec.correction == "token":
        yield (
            "is",
            "an exact term is already averaged over its own token, so a token weight on it is 1",
            "is:none (the behaviour policy's states), is:prefix (the policy's states) or is:decision",
        )
    if spec.clip is not None:
        yield "clip", "an exact own term has no score coefficient to clip", "clip with a sampled estimator"


def _horizon_rules(spec: KLSpec, parts: Mapping[str, HasPosition]) -> Iterator[tuple[str, str, str]]:
    if spec.horizon == "token" and spec.placement != "reward":
        for name in FUTURE_ONLY:
            if name in parts:
                yield (
                    name,
                    f"{name!r} belongs to the future-KL term, which horizon:token leaves out",
                    "horizon:sequence",
                )
    if spec.correction == "decision" and spec.horizon == "token":
        yield (
            "is",
            "is:decision weights each future term by its own product",
            "horizon:sequence beside it, or is:prefix",
        )
    row = find_estimator(spec.estimator)
    own_possible = row is not None and row.is_f_divergence
    if spec.future == "own" and not own_possible:
        yield "future", f"future:own is for f-divergences; {spec.estimator} is none", "k1, k3 or exact"
    if own_possible and spec.future not in (None, "own"):
        yield "future", f"the future term of {spec.estimator} is f(delta_j)", "future:own (the default)"


def _weight_rules(spec: KLSpec, parts: Mapping[str, HasPosition]) -> Iterator[tuple[str, str, str]]:
    if spec.clip is not None:
        for name in ("is", *WEIGHT_OPTIONS):
            if name in parts:
                yield (
                    name,
                    f"clip already implies the token weight, so {name!r} beside it contradicts it",
                    "one of the two",
                )
    elif spec.correction == "none":
        for name in (*WEIGHT_OPTIONS, "behaviour"):
            if name in parts:
                yield (
                    name,
                    f"{name!r} acts on an importance weight, and there is none",
                    "is:token, prefix, sequence or decision",
                )


def _bias_rules(spec: KLSpec) -> Iterator[tuple[str, str, str]]:
    if spec.target == "none" and not spec.allow_biased:
        yield (
            "",
            "its expected gradient is that of no divergence (kl-plugins explain says why)",
            "another spec, or /allow:biased if that is what you want to study",
        )
    if spec.target != "none" and spec.allow_biased:
        yield "allow", f"not needed: this spec estimates {spec.target}", "the spec without allow:biased"
