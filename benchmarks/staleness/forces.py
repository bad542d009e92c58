"""The pull of a KL term on one token's log-prob, and the potential that the pull comes from.

The module looks at one token in one state. p, r and m are its probabilities under policy, reference and sampler, and
u = log(p/r). The sampler draws the token with probability m, and the term then moves its log-prob by ``-coefficient``,
where the coefficient includes the weight. So the expected pull on log p is ``-m * coefficient``; it is positive if it
raises p. The contribution of the softmax's normalisation is left out, because it is smaller by the factor p. `kl_term`
computes all coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_plugins import KLSpec, KLSpecError
from kl_plugins.term import kl_term

REFERENCE = 1e-3
"""The probability r. All results are in units of r, so its value does not matter; p = 100 r must be a probability."""

TREATMENTS = {
    "no weight": "",
    "token weight": "/is:token",
    "floor 0.5": "/is:token/floor:0.5",
    "cap 2": "/is:token/cap:2",
    "band 0.5-2": "/is:token/band:0.5-2",
    "clip 0.2": "/clip:0.2",
}
ESTIMATORS = {
    "k1": "k1@loss{}/allow:biased",
    **{
        name: name + "@loss{}"
        for name in ("k2", "k3", "k3+", "abs", "jeffreys", "jsd", "hellinger", "chi2", "alpha-0.5", "alpha-2")
    },
}
"""All sampled estimators. `exact` is not among them: it averages over tokens, so there is no pull of a single draw."""

SAMPLERS = (1.0, 0.1, 10.0, None)
"""Values of m/r for a sampler that does not change; None stands for fresh data, where m = p."""

STARTS = (1e-1, 1e-2, 1e-4)
"""Values of p/r from which a suppressed token starts its way back."""

END = 10**-0.3
"""The value of p/r at which the way back ends; it is the point of the grid that is nearest to a half."""

TREND = 0.02
"""Exponent that classifies a pull as p goes to 0.

A pull that rises at least like p**-0.02 ``grows``; a pull that falls at least like p**0.02 ``fades``.
"""


def grid(points: int = 801) -> Tensor:
    """Return values of p/r from 1e-6 to 1e2, equally spaced in log p; the default grid has a point at p = r."""
    return torch.logspace(-6, 2, points, dtype=torch.float64)


def pull(spec: KLSpec, ratio: Tensor, sampler: float | None = 1.0) -> Tensor:
    """Compute the expected pull on log p per draw of the sampler, in units of r.

    Args:
        spec: a sampled `@loss` spec of the token horizon.
        ratio: (N,) p/r.
        sampler: m/r, or None for m = p.

    Returns:
        (N,) ``-m * coefficient / r``, nats.
    """
    reference = torch.full_like(ratio, REFERENCE).log()[None]
    logp = reference + ratio.log()
    drawn = ratio if sampler is None else torch.full_like(ratio, sampler)
    term = kl_term(spec, logp, reference, torch.ones_like(logp, dtype=torch.bool), sampler_logp=reference + drawn.log())
    return -drawn * term.coefficient[0]


def potential(ratio: Tensor, pulls: Tensor) -> Tensor:
    """Compute the potential: minus the integral of the pull over log p, by trapezoids, and 0 at p = r.

    Args:
        ratio: (N,) p/r, rising, with a point at 1.
        pulls: (N,) from :func:`pull`.

    Returns:
        (N,) potential in units of r nats; its negative slope is the pull.
    """
    rising = -torch.cumulative_trapezoid(pulls, ratio.log())
    found = torch.cat([torch.zeros(1, dtype=rising.dtype), rising])
    return found - found[(ratio - 1).abs().argmin()]


def time_back(ratio: Tensor, pulls: Tensor, start: float, end: float = END) -> float:
    """Compute the time in which the pull alone brings a suppressed token from p/r = ``start`` back to ``end``.

    Returns:
        The integral of d log p / pull, in updates times step size times r; infinite if there is no pull upwards.
    """
    inside = (ratio >= start * (1 - 1e-9)) & (ratio <= end * (1 + 1e-9))
    if (pulls[inside] <= 0).any():
        return float("inf")
    return torch.trapezoid(1 / pulls[inside], ratio[inside].log()).item()


def trend(ratio: Tensor, pulls: Tensor) -> str:
    """Return the trend of the pull as p goes to 0.

    It is ``grows``, ``holds`` (the pull is constant), ``fades``, ``pushes down``, or ``none`` without a pull.
    """
    if pulls[0] <= 0:
        return "none" if pulls[0] == 0 else "pushes down"
    slope = ((pulls[1] / pulls[0]).log() / (ratio[1] / ratio[0]).log()).item()
    return "fades" if slope > TREND else "grows" if slope < -TREND else "holds"


@dataclass(frozen=True)
class Curve:
    """The pull of one estimator under one treatment of its weight.

    Attributes:
        estimator: name of the estimator.
        treatment: a key of `TREATMENTS`.
        spec: the canonical text of the spec.
        sampler: m/r; None for m = p.
        pulls: (N,) pull at each point of the grid, in units of r.
        wells: (N,) potential at each point of the grid.
    """

    estimator: str
    treatment: str
    spec: str
    sampler: float | None
    pulls: Tensor
    wells: Tensor

    def summary(self, ratio: Tensor) -> dict[str, Any]:
        """Describe the force on a token that was pushed down: largest pull, depth of the well, time of the way back."""
        below = ratio < 1
        largest = int(self.pulls[below].argmax())
        return {
            "estimator": self.estimator,
            "treatment": self.treatment,
            "spec": self.spec,
            "sampler_over_reference": self.sampler,
            "pull_at_1e-6": self.pulls[0].item(),
            "largest_pull_below_reference": self.pulls[largest].item(),
            "u_of_largest_pull": ratio[largest].log().item(),
            "depth_to_1e-6": self.wells[0].item(),
            "trend_to_zero": trend(ratio, self.pulls),
            "time_back_from": {f"{start:g}": _finite(time_back(ratio, self.pulls, start)) for start in STARTS},
        }


def _finite(value: float) -> float | None:
    # JSON has no infinity, so it becomes None.
    return value if value < float("inf") else None


def curves(ratio: Tensor) -> Iterator[Curve]:
    """Yield the curve of every estimator under every treatment that the rules of specs allow, for every sampler."""
    for estimator, form in ESTIMATORS.items():
        for treatment, options in TREATMENTS.items():
            try:
                spec = KLSpec.parse(form.format(options))
            except KLSpecError:
                continue
            for sampler in SAMPLERS:
                pulls = pull(spec, ratio, sampler)
                yield Curve(estimator, treatment, str(spec), sampler, pulls, potential(ratio, pulls))


def refused() -> dict[str, str]:
    """Return the combinations that the rules of specs forbid, each with the reason."""
    found = {}
    for form in ESTIMATORS.values():
        for options in TREATMENTS.values():
            try:
                KLSpec.parse(form.format(options))
            except KLSpecError as error:
                found[form.format(options)] = str(error).splitlines()[0]
    return found
