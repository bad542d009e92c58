"""The sweeps over settings, and the count of the runs that ran away under each KL term."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, quantile, tensor

from benchmarks.intervals import wilson
from benchmarks.staleness.dynamics import Course, Setting, simulate
from kl_plugins import KLSpec

ARMS = {
    "no weight": "k2@loss",
    "token weight": "k2@loss/is:token",
    "floor 0.2": "k2@loss/is:token/floor:0.2",
    "floor 0.5": "k2@loss/is:token/floor:0.5",
    "floor 1": "k2@loss/is:token/floor:1",
    "cap 2": "k2@loss/is:token/cap:2",
    "cap 1": "k2@loss/is:token/cap:1",
    "floor 0.5 and cap 2": "k2@loss/is:token/floor:0.5/cap:2",
    "band 0.5-2": "k2@loss/is:token/band:0.5-2",
    "clip 0.2": "k2@loss/clip:0.2",
    "k3 weighted": "k3@loss/is:token",
    "Jeffreys weighted": "jeffreys@loss/is:token",
    "exact": "exact@loss",
}
"""The spec of each arm."""

NO_KL = "no KL term"
QUARTILES = ("lower", "median", "upper")


@dataclass(frozen=True)
class Sweep:
    """One setting with one of its fields varied.

    Attributes:
        title: description of the varied field.
        field: name of the varied field of :class:`Setting`.
        values: values of that field.
        base: setting with the values of all other fields.
    """

    title: str
    field: str
    values: tuple[float, ...]
    base: Setting

    def settings(self) -> Iterator[tuple[float, Setting]]:
        """Yield each value with its setting."""
        for value in self.values:
            yield value, replace(self.base, **{self.field: value})  # type: ignore[arg-type]

    def described(self) -> dict[str, Any]:
        """Return the description of the sweep for the JSON file."""
        return {"title": self.title, "field": self.field, "values": list(self.values), "base": asdict(self.base)}


def noisy(base: Setting) -> Setting:
    """Return the main setting: plain SGD with a policy gradient that is only noise."""
    return replace(base, optimizer="sgd", rate=1.0, samples=4, noise=3.0)


def sweeps(runs: int, seed: int, smoke: bool) -> dict[str, Sweep]:
    """Return all sweeps by name.

    Args:
        runs: number of independent runs of every arm and value.
        seed: seed of references, starts and draws.
        smoke: whether to use the smallest size that runs through.
    """
    adam = Setting(runs=runs, seed=seed)
    sgd, lagging = replace(adam, optimizer="sgd"), replace(adam, lagging=True)
    main, delays = noisy(adam), (1, 4, 16, 32, 64, 128)
    found = {
        "noise, delay": Sweep("updates between renewals of the sampler", "delay", delays, main),
        "noise, lag": Sweep("updates that the sampler is behind", "delay", (4, 16, 64), replace(main, lagging=True)),
        "noise, strength": Sweep("deviation of the advantages, per unit of beta", "noise", (1.0, 2.0, 3.0, 4.0), main),
        "adam, delay": Sweep("updates between renewals of the sampler", "delay", delays, adam),
        "adam, lag": Sweep("updates that the sampler is behind", "delay", (4, 16, 64), lagging),
        "adam, rate": Sweep("step size of Adam", "rate", (0.05, 0.1, 0.2, 0.4), adam),
        "adam, samples": Sweep("tokens drawn per update", "samples", (1, 4, 16), adam),
        "adam, tokens": Sweep("size of the vocabulary", "tokens", (8, 32, 128), adam),
        "adam, distance": Sweep("deviation of the start's logits", "distance", (0.5, 1.0, 2.0), adam),
        "sgd, rate": Sweep("step size of SGD without a policy gradient", "rate", (1.0, 4.0), sgd),
        "expectation, adam": Sweep("no sampling noise", "delay", (64,), replace(adam, samples=0)),
        "expectation, sgd": Sweep("no sampling noise", "delay", (64,), replace(sgd, samples=0, rate=1.0)),
    }
    if not smoke:
        return found
    short = {name: replace(sweep.base, updates=4) for name, sweep in found.items()}
    return {name: replace(sweep, values=sweep.values[-1:], base=short[name]) for name, sweep in found.items()}


def measure(sweep: Sweep, known: dict[tuple[str, Setting], dict[str, Any]], done: Callable[[], None]) -> list[Any]:
    """Run a sweep.

    Args:
        sweep: the sweep.
        known: results so far, by arm and setting. Sweeps have some settings in common, which are run only once.
        done: function that is called after each value.

    Returns:
        One row per value and arm.
    """
    rows = []
    for value, setting in sweep.settings():
        if missing := [arm for arm in ARMS if (arm, setting) not in known]:
            alone = simulate(None, setting)
            known[NO_KL, setting] = {"final_kl": quartiles(alone.divergence[-1])}
            for arm in missing:
                known[arm, setting] = counted(simulate(KLSpec.parse(ARMS[arm]), setting), alone)
        without = known[NO_KL, setting]["final_kl"]["median"]
        for arm, text in ARMS.items():
            about = {"field": sweep.field, "value": value, "arm": arm, "spec": str(KLSpec.parse(text))}
            rows.append({**about, **known[arm, setting], "final_kl_without_median": without})
        done()
    return rows


def counted(course: Course, alone: Course) -> dict[str, Any]:
    """Count the runs that ran away, that is, ended further from the reference than without a KL term.

    Args:
        course: results with the KL term.
        alone: results of the same runs without a KL term; without a policy gradient they do not move.

    Returns:
        Count, share with its 95 % interval, quartiles of the final and of the largest KL, and the share of the
        reference's probability that was lost.
    """
    final = course.divergence[-1]
    away = int((final > alone.divergence[-1]).sum())
    low, high = wilson(away, len(final))
    return {
        "away": away,
        "runs": len(final),
        "share": away / len(final),
        "low": low,
        "high": high,
        "final_kl": quartiles(final),
        "largest_kl": quartiles(course.divergence.amax(0)),
        "lost_median": course.lost.median().item(),
    }


def quartiles(values: Tensor) -> dict[str, float]:
    """Return median and quartiles of (runs,) values."""
    found = quantile(values, tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return dict(zip(QUARTILES, found, strict=True))


def courses(setting: Setting) -> dict[str, dict[str, list[float]]]:
    """Return median and quartiles of the KL after each update, nats, for every arm and without a KL term."""
    specs = {NO_KL: None, **{arm: KLSpec.parse(text) for arm, text in ARMS.items()}}
    return {arm: _curve(simulate(spec, setting).divergence) for arm, spec in specs.items()}


def _curve(divergence: Tensor) -> dict[str, list[float]]:
    rows = quantile(divergence, tensor([0.25, 0.5, 0.75], dtype=divergence.dtype), dim=1).tolist()
    # Numbers have four digits, because the file has thousands of them.
    return {name: [float(f"{value:.4g}") for value in row] for name, row in zip(QUARTILES, rows, strict=True)}
