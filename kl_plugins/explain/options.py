"""What each word of the KL spec does, for ``kl-plugins explain`` and ``kl-plugins list``."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins.controllers import BetaSchedule
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import DEFAULT_BOUND, format_number

PLACEMENT_MEANINGS: dict[str, str] = {
    "loss": "a differentiable term beside the policy loss; its coefficient is the gradient",
    "reward": "into the host's own KL-in-reward site; what the host does with it is in its receipt",
    "advantage": "subtracted from per-token advantages after they are normalised",
}

CORRECTION_MEANINGS: dict[str, str] = {
    "none": "no importance weight: the data are read as on-policy",
    "token": "rho_t: the token's own policy/behaviour ratio",
    "prefix": "rho_{1:t}: the product of ratios up to the token, which corrects its state too",
    "sequence": "rho_{1:T}: the ratio of the whole response",
    "decision": "rho_{1:t} on the own term and rho_{1:j} on each future term (per decision); needs horizon:sequence",
}

OPTION_MEANINGS: dict[str, tuple[str, str]] = {
    "top": ("<k>", "exact only: the k most probable tokens exactly, the tail by an unbiased sample"),
    "horizon": ("token|sequence", "sequence adds the future-KL term: what a token does to the states after it"),
    "future": ("k1|k3|exact|own", "estimator of the future term; own is f(delta) of an f-divergence"),
    "gamma": ("<0..1>", "discount of the future term per response token; default 1"),
    "is": ("none|token|prefix|sequence|decision", "importance weight on the KL term, @loss only; default none"),
    "behaviour": (
        "sampler|old",
        "whose log-probs the weight divides by; unset: the sampler's if given, else the old ones",
    ),
    "cap": ("<c>", "weights above c become c (first)"),
    "band": ("<lo>-<hi>", "weights outside the closed interval become 0 (second)"),
    "norm": ("", "weights are divided by their mean over the response tokens passed (third)"),
    "clip": ("<eps>", "clipped KL head max(rho k', clip(rho, 1-eps, 1+eps) k'); implies the token weight"),
    "bound": ("<x>", f"largest |log-ratio| inside an exp, nats; default {format_number(DEFAULT_BOUND)}"),
    "beta": ("<schedule>", "control of beta over the run; unset: the host's constant"),
    "allow": ("biased", "required exactly where the target is none: you know that no divergence is estimated"),
}

BETA_MEANINGS: dict[str, tuple[str, str]] = {
    "linear": ("linear-<b0>-<b1>-<n>", "from b0 to b1 in n updates, on a line"),
    "cosine": ("cosine-<b0>-<b1>-<n>", "from b0 to b1 in n updates, on half a cosine"),
    "adaptive": (
        "adaptive-<target>-<horizon>",
        "multiplied up or down towards an observed KL of target nats per token",
    ),
    "dual": ("dual-<target>-<lr>", "dual ascent: beta += lr (observed KL - target), never below 0"),
}


@dataclass(frozen=True)
class Option:
    """One option in effect: its value as text, whether that is the default, and what it does here."""

    name: str
    value: str
    default: bool
    meaning: str


def options_in_effect(spec: KLSpec) -> tuple[Option, ...]:
    """Every option that acts under this spec, in canonical order; options without a meaning here are left out."""
    written = {part.partition(":")[0] for part in str(spec).split("/")[1:]}
    loss, sequence = spec.placement == "loss", spec.horizon == "sequence"
    number = format_number
    found: list[tuple[str, str, str]] = []
    if spec.estimator == "exact":
        found.append(("top", number(spec.top) if spec.top else "all", _top(spec.top)))
    if spec.placement != "reward":
        found.append(("horizon", spec.horizon, _HORIZONS[spec.horizon]))
    if sequence:
        found.append(("future", spec.future or "", _FUTURES[spec.future or "own"]))
        found.append(("gamma", number(spec.gamma), _gamma(spec.gamma)))
    if loss and spec.clip is None:
        found.append(("is", spec.correction, CORRECTION_MEANINGS[spec.correction]))
    if spec.needs_behaviour:
        found.append(("behaviour", spec.behaviour or "automatic", _BEHAVIOURS[spec.behaviour]))
    if spec.cap is not None:
        found.append(("cap", number(spec.cap), f"weights above {number(spec.cap)} become {number(spec.cap)}"))
    if spec.band is not None:
        low, high = map(number, spec.band)
        found.append(
            ("band", f"{low}-{high}", f"weights outside [{low}, {high}] become 0, so these tokens are left out")
        )
    if spec.norm:
        found.append(("norm", "", "weights are divided by their mean over the response tokens of the call"))
    if spec.clip is not None:
        found.append(
            ("clip", number(spec.clip), "clipped KL head with the token weight, apart from the policy loss's clip")
        )
    found.append(("bound", number(spec.bound), f"log-ratios are held within +-{number(spec.bound)} nats inside an exp"))
    found.append(("beta", _schedule_text(spec.beta), _beta(spec.beta)))
    if spec.allow_biased:
        found.append(("allow", "biased", "accepts that the expected gradient is that of no divergence"))
    return tuple(Option(name, value, name not in written, meaning) for name, value, meaning in found)


_HORIZONS = {
    "token": "each token's own divergence; what it does to later states is left out",
    "sequence": "adds the future-KL term: what a token does to the states after it",
}
_FUTURES = {
    "k1": "future terms are log-ratios u_j",
    "k3": "future terms are k3_j: same mean, less variance near the reference, a heavy tail far from it",
    "exact": "future terms are full-vocabulary KLs: the least variance",
    "own": "future terms are f(delta_j) of the divergence itself",
}
_BEHAVIOURS = {
    None: "the sampler's log-probs where the host has them, else the old policy's; the receipt says which",
    "sampler": "the log-probs that the inference engine sampled with; an error where the host has none",
    "old": "the trainer's own log-probs at rollout time",
}


def _top(top: int | None) -> str:
    return (
        f"the {top} most probable tokens exactly, the tail by an unbiased sample"
        if top
        else "the whole vocabulary exactly"
    )


def _gamma(gamma: float) -> str:
    return "later tokens count in full" if gamma == 1 else f"a token k steps later counts {format_number(gamma)}^k"


def _schedule_text(schedule: BetaSchedule | None) -> str:
    return "-".join([schedule.kind, *map(format_number, schedule.numbers)]) if schedule else "constant"


def _beta(schedule: BetaSchedule | None) -> str:
    if schedule is None:
        return "the host's own beta, constant"
    first, second, *rest = map(format_number, schedule.numbers)
    return {
        "linear": f"from {first} to {second} in {rest and rest[0]} updates, on a line",
        "cosine": f"from {first} to {second} in {rest and rest[0]} updates, on half a cosine",
        "adaptive": f"from the host's beta towards an observed KL of {first} nats per token, over {second} sequences",
        "dual": f"from the host's beta, beta += {second} (observed KL - {first}), never below 0",
    }[schedule.kind]
