"""The options of the importance weight on the KL term: its level, its denominator and its treatment.

They are rows of the table in :mod:`kl_plugins.spec.options`. :mod:`kl_plugins.corrections` computes the weight and
applies the treatments in the order of these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kl_plugins.estimators import find_estimator
from kl_plugins.spec.grammar import format_number, parse_numbers
from kl_plugins.spec.option_row import (
    LOSS_ONLY,
    BadValueError,
    Fault,
    OptionRow,
    Reference,
    Values,
    flag,
    number,
    words,
)

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec

OLD_CAVEAT = "behaviour:old is exact only where the old policy drew the samples, not a different sampler"
"""Caveat of every weight that divides by old log-probs, which the spec names or the host uses by default."""


def _beside_clip(spec: KLSpec, name: str) -> Iterator[Fault]:
    if spec.clip is not None:
        yield f"clip already implies the token weight, so {name!r} beside it contradicts it", "one of the two"


def _without_weight(spec: KLSpec, name: str) -> Iterator[Fault]:
    if not spec.needs_behaviour:
        yield f"{name!r} acts on an importance weight, and there is none", "is:token, prefix, sequence or decision"


def _is_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.estimator == "exact" and spec.top is None and spec.correction == "token":
        yield (
            "an exact term is already averaged over its own token, so a token weight on it is 1",
            "is:none (the behaviour policy's states), is:prefix (the policy's states) or is:decision; or top: beside "
            "it, whose remainder is sampled",
        )
    if spec.correction == "decision" and spec.horizon == "token":
        yield "is:decision weights each future term by its own product", "horizon:sequence beside it, or is:prefix"
    yield from _beside_clip(spec, "is")


def _is_caveat(spec: KLSpec) -> str:
    if spec.correction in ("prefix", "sequence", "decision"):
        return "products of importance weights decay or explode with length: watch kl/ess"
    return ""


def _is_source(spec: KLSpec) -> Reference:
    if spec.correction in ("prefix", "decision"):
        return "Precup, Sutton, Singh 2000", "per-decision importance weights"
    return None


def _treatment_faults(name: str) -> Callable[[KLSpec], Iterator[Fault]]:
    def faults(spec: KLSpec) -> Iterator[Fault]:
        yield from _beside_clip(spec, name)
        yield from _without_weight(spec, name)

    return faults


def _floor_faults(spec: KLSpec) -> Iterator[Fault]:
    without = "the spec without floor"
    if spec.estimator == "exact" and spec.top is None:
        yield "an exact own term has no weight of its own token that a floor could raise", without
    yield from _beside_clip(spec, "floor")
    if spec.correction == "none":
        yield "'floor' acts on an importance weight, and there is none", "is:token beside it"
    if spec.horizon != "token":
        yield "a floor on a sum over later tokens leaves a force that is not zero at the reference", "horizon:token"
    if spec.correction != "token":
        yield (
            "a floor on a product of weights acts because of earlier tokens, whatever the token itself does, and "
            "brings back states that the policy has left",
            "is:token",
        )
    if spec.band is not None:
        yield "floor keeps the tokens with small weights, and band drops them", "one of the two"
    if spec.norm:
        yield "norm divides by the mean weight, so a raised weight may end below the floor again", "one of the two"
    if spec.cap is not None and spec.floor is not None and spec.cap < spec.floor:
        yield f"the cap {format_number(spec.cap)} is below the floor", f"a floor of {format_number(spec.cap)} or less"
    row = find_estimator(spec.estimator)
    # With top:, the sampled coefficient is the remainder. It is 0 at the reference, like a restoring coefficient, and
    # the bucket is not sampled. So top: is allowed.
    if spec.top is None and (row is None or not row.restoring):
        yield (
            f"the coefficient of {spec.estimator} is not known to have the sign of u, so a raised weight may push away "
            "from the reference",
            "an estimator whose coefficient has it, such as k2, k3 or jeffreys (see restoring in register_estimator)",
        )


def _floor_caveat(spec: KLSpec) -> str:
    if spec.floor is None:
        return ""
    floor = format_number(spec.floor)
    if spec.top is not None:
        return (
            f"floor raises the weight of the sampled remainder alone; its bias is E_behaviour[({floor} - w)+ v grad "
            f"log policy] over the tokens outside the top {spec.top}, which is 0 where no weight w is below {floor}"
        )
    return (
        f"floor keeps a pull on tokens that the policy has all but dropped; its bias is "
        f"E_behaviour[({floor} - w)+ c(u) grad log policy], which is 0 where no weight w is below {floor}"
    )


def _cap_on_policy(spec: KLSpec) -> str:
    if spec.cap is not None and spec.cap < 1:
        return "a cap below 1 scales the whole term by it, since every weight is 1"
    return ""


def _read_band(text: str) -> tuple[float, float]:
    interval = parse_numbers(text)
    if interval is None or len(interval) != 2 or interval[0] > interval[1] or interval[1] == 0:
        raise BadValueError(f"{text!r} is no interval", "<lo>-<hi> with 0 <= lo <= hi, hi > 0, e.g. 0.5-2")
    return interval[0], interval[1]


def _band_effect(band: tuple[float, float]) -> str:
    low, high = map(format_number, band)
    return f"weights outside [{low}, {high}] become 0, so these tokens are left out"


BAND = Values(
    "<lo>-<hi>",
    _read_band,
    lambda band: "-".join(map(format_number, band)),
    _band_effect,
    forms=("<lo>-<hi>",),
    examples=(("0.5-2", ".5-2.0", (0.5, 2.0)), ("0-1e3", "0-1000", (0.0, 1e3)), ("1e-7-1", "1e-7-1.0", (1e-7, 1.0))),
)


def _band_leaves_nothing(spec: KLSpec) -> str:
    if spec.band is not None and not spec.band[0] <= 1 <= spec.band[1]:
        return "the band excludes 1, the weight of on-policy tokens, so all are dropped"
    return ""


def _clip_faults(spec: KLSpec) -> Iterator[Fault]:
    if spec.estimator == "exact":
        yield "an exact own term has no score coefficient to clip", "clip with a sampled estimator"


WEIGHT_OPTIONS = (
    OptionRow(
        "is",
        words(
            {
                "none": "no importance weight: the data are read as on-policy",
                "token": "rho_t: the token's own policy/behaviour ratio",
                "prefix": "rho_{1:t}: the product of ratios up to the token, which corrects its state too",
                "sequence": "rho_{1:T}: the ratio of the whole response",
                "decision": "rho_{1:t} on the own term and rho_{1:j} on each future term (per decision); needs "
                "horizon:sequence",
            }
        ),
        "importance weight on the KL term, @loss only; default none",
        attribute="correction",
        places=LOSS_ONLY,
        faults=_is_faults,
        acts=lambda spec: spec.placement == "loss" and spec.clip is None,
        caveat=_is_caveat,
        source=_is_source,
    ),
    OptionRow(
        "behaviour",
        words(
            {
                "sampler": "the log-probs that the inference engine sampled with; an error where the host has none",
                "old": "the trainer's own log-probs at rollout time",
            }
        ),
        "whose log-probs the weight divides by; unset: the sampler's if given, else the old ones",
        other_names=("behavior",),
        places=LOSS_ONLY,
        faults=lambda spec: _without_weight(spec, "behaviour"),
        acts=lambda spec: spec.needs_behaviour,
        unset=(
            "automatic",
            "the sampler's log-probs where the host has them, else the old policy's; the receipt says which",
        ),
        caveat=lambda spec: OLD_CAVEAT if spec.behaviour == "old" else "",
    ),
    OptionRow(
        "floor",
        number(
            "<c>",
            lambda c: f"weights below {c} become {c}",
            {"0.5": ".5", "0.2": "2e-1", "1": "1.0", "1e-3": "0.001"},
            expected="a number above 0 and at most 1",
            holds=lambda x: 0 < x <= 1,
        ),
        "weights below c become c (first), 0 < c <= 1; needs is:token and horizon:token",
        places=LOSS_ONLY,
        faults=_floor_faults,
        weight=lambda floor, weight: f"max({weight}, {format_number(floor)})",
        caveat=_floor_caveat,
        bends=True,
    ),
    OptionRow(
        "cap",
        number(
            "<c>",
            lambda c: f"weights above {c} become {c}",
            {"2": "2.0", "0.5": ".5", "1e-3": "0.001", "1e7": "10000000"},
        ),
        "weights above c become c (after floor)",
        places=LOSS_ONLY,
        faults=_treatment_faults("cap"),
        weight=lambda cap, weight: f"min({weight}, {format_number(cap)})",
        caveat="cap truncates large weights: lower variance, and tokens that the policy moved towards count less",
        bends=True,
        on_policy=_cap_on_policy,
        source=("Ionides 2008", "truncated importance sampling"),
    ),
    OptionRow(
        "band",
        BAND,
        "weights outside the closed interval become 0 (after cap)",
        places=LOSS_ONLY,
        faults=_treatment_faults("band"),
        weight=lambda band, weight: f"{weight}, 0 outside [{', '.join(map(format_number, band))}]",
        caveat="band drops tokens whose weight is outside it: lower variance, biased by what is dropped",
        bends=True,
        nothing_left=_band_leaves_nothing,
    ),
    OptionRow(
        "norm",
        flag("weights are divided by their mean over the response tokens of the call"),
        "weights are divided by their mean over the response tokens passed (after band)",
        places=LOSS_ONLY,
        faults=_treatment_faults("norm"),
        weight=lambda _, weight: f"{weight}, divided by its mean over the response tokens",
        caveat="norm divides by the mean weight of the tokens passed, so the result depends on micro-batching",
        bends=True,
        source=("Owen 2013, chapter 9", "self-normalised weights, effective sample size"),
    ),
    OptionRow(
        "clip",
        number(
            "<eps>",
            lambda _: "clipped KL head with the token weight, apart from the policy loss's clip",
            {"0.2": "2e-1", "0.5": "00.5", "10": "1e1", "1e7": "10000000"},
        ),
        "clipped KL head max(rho k', clip(rho, 1-eps, 1+eps) k'); implies the token weight",
        places=LOSS_ONLY,
        faults=_clip_faults,
        caveat="clip drops the KL gradient of tokens whose importance weight left the interval on the clipped side",
        bends=True,
        source=("arXiv 2510.01555", "the KL term as a clipped head of its own"),
    ),
)
"""The options of the importance weight, in canonical order."""
