"""Valid specs by the grammar: what a user may write, what it means, its canonical text. Never asks the parser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from kl_plugins.controllers import BetaSchedule

KL_ESTIMATORS = ("k1", "k2", "k3", "k3+", "abs")
F_DIVERGENCES = ("jeffreys", "jsd", "hellinger", "chi2", "alpha-0.5", "alpha-1", "alpha-2", "alpha-3")
SAMPLED = KL_ESTIMATORS + F_DIVERGENCES
PLACEMENTS = ("loss", "reward", "advantage")
ORDER = [
    "top",
    "horizon",
    "future",
    "gamma",
    "is",
    "behaviour",
    "cap",
    "band",
    "norm",
    "clip",
    "bound",
    "beta",
    "allow",
]

NUMBERS = {
    "1e-3": ("0.001", ".001", "1e-3", "1E-3", "10e-4"),
    "0.2": ("0.2", ".2", "0.20", "2e-1"),
    "0.5": ("0.5", ".5", "00.5"),
    "1": ("1", "1.", "1.0", "1e0", "1E+0"),
    "2": ("2", "2.0", "0.2e1"),
    "10": ("10", "10.0", "1e1"),
    "1e3": ("1000", "1e3", "1.0e+3"),
    "1e7": ("10000000", "1e07"),
    "1.5e-9": ("1.5e-9", "0.0000000015"),
}
"""Shortest text of a number -> ways to write it."""


@dataclass(frozen=True)
class Written:
    """A spec as a user could write it."""

    text: str
    canonical: str
    fields: dict[str, Any]


numbers = st.sampled_from(sorted(NUMBERS)).flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(NUMBERS[n])))


def is_biased(estimator: str, placement: str, horizon: str, correction: str, *, clipped: bool) -> bool:
    """Whether theory says that the spec's gradient is that of no divergence."""
    if placement == "reward":
        return estimator != "k1"
    if placement == "advantage":
        return estimator not in ("k1", "exact")
    if estimator == "k1":
        return True
    if horizon == "token":
        return False
    f_divergence = estimator in F_DIVERGENCES
    return clipped or correction in ("token", "prefix") or not (f_divergence or estimator in ("k2", "k3+", "exact"))


@st.composite
def written_specs(draw: st.DrawFn, placements: tuple[str, ...] = PLACEMENTS, exact: bool = True) -> Written:
    """Any valid spec, its options in any order, its numbers in any notation."""
    placement = draw(st.sampled_from(placements))
    names = SAMPLED + (("exact",) if exact and placement != "reward" else ())
    estimator = draw(st.sampled_from(names))
    chosen: dict[str, tuple[str, str, Any]] = {}  # option -> canonical value ("" where default), as written, parsed
    is_f = estimator in F_DIVERGENCES

    def number(name: str, allowed: tuple[str, ...] = ()) -> None:
        canonical, written = draw(numbers.filter(lambda pair: not allowed or pair[0] in allowed))
        chosen[name] = (canonical, written, float(canonical))

    if estimator == "exact" and draw(st.booleans()):
        chosen["top"] = draw(st.sampled_from([("1", "1.0", 1), ("20", "20", 20), ("1e3", "1000", 1000)]))
    horizon = default = "sequence" if placement == "advantage" else "token"
    sampled_score = placement == "advantage" and estimator != "exact"
    if (placement == "loss" or sampled_score) and draw(st.booleans()):
        horizon = draw(st.sampled_from(("token", "sequence")))
        chosen["horizon"] = ("" if horizon == default else horizon, horizon, horizon)
    future = None
    if horizon == "sequence":
        future = default_future = "own" if is_f else "exact" if estimator == "exact" else "k1"
        choices = ("own",) if is_f else ("k1", "k3", "exact")
        if estimator == "exact" and placement == "advantage":
            choices = ("exact",)
        if not exact:
            choices = tuple(c for c in choices if c != "exact")
        if draw(st.booleans()):
            future = draw(st.sampled_from(choices))
            chosen["future"] = ("" if future == default_future else future, future, future)
        if draw(st.booleans()):
            canonical, written = draw(st.sampled_from([("0", "0.0"), ("0.5", ".5"), ("", "1.0")]))
            chosen["gamma"] = (canonical, written, float(written))
    correction, clipped = "none", False
    if placement == "loss":
        levels = ["none", "prefix", "sequence"]
        levels += ["token"] if estimator != "exact" else []
        levels += ["decision"] if horizon == "sequence" else []
        clipped = estimator != "exact" and draw(st.integers(0, 4)) == 0
        if clipped:
            number("clip")
        elif draw(st.booleans()):
            correction = draw(st.sampled_from(levels))
            chosen["is"] = ("" if correction == "none" else correction, correction, correction)
        if correction != "none":
            if draw(st.booleans()):
                number("cap")
            if draw(st.booleans()):
                pairs = [
                    ("0.5-2", ".5-2.0", (0.5, 2.0)),
                    ("0-1e3", "0-1e3", (0.0, 1e3)),
                    ("1e-7-1", "1e-7-1", (1e-7, 1.0)),
                ]
                chosen["band"] = draw(st.sampled_from(pairs))
            if draw(st.booleans()):
                chosen["norm"] = ("norm", "norm", True)
        if (clipped or correction != "none") and draw(st.booleans()):
            behaviour = draw(st.sampled_from(("sampler", "old")))
            chosen["behaviour"] = (behaviour, behaviour, behaviour)
    if draw(st.booleans()):
        canonical, written = draw(st.sampled_from([("1e-3", "0.001"), ("", "30.0"), ("50", "50"), ("1e3", "1000")]))
        chosen["bound"] = (canonical, written, float(written))
    if draw(st.booleans()):
        chosen["beta"] = draw(st.sampled_from(BETAS))
    if is_biased(estimator, placement, horizon, correction, clipped=clipped):
        chosen["allow"] = ("biased", "biased", True)
    order = draw(st.permutations(sorted(chosen)))
    aliases = {"alpha-0.5": "alpha-.50", "alpha-2": "alpha-2.0"}
    head = aliases.get(estimator, estimator) if draw(st.booleans()) else estimator
    names_of = {"is": "correction", "allow": "allow_biased"}
    fields = {names_of.get(name, name): parsed for name, (_, _, parsed) in chosen.items()}
    return Written(
        f"{head}@{placement}" + "".join(_option(name, chosen[name][1]) for name in order),
        f"{estimator}@{placement}" + "".join(_option(n, chosen[n][0]) for n in ORDER if n in chosen and chosen[n][0]),
        {"estimator": estimator, "placement": placement, "horizon": horizon, "future": future} | fields,
    )


def _option(name: str, value: str) -> str:
    return "/norm" if name == "norm" else f"/{name}:{value}"


BETAS = [
    ("linear-0.1-0-100", "linear-1e-1-0.0-100", BetaSchedule("linear", (0.1, 0.0, 100.0))),
    ("cosine-1e-5-0.2-1e4", "cosine-0.00001-.2-10000", BetaSchedule("cosine", (1e-5, 0.2, 1e4))),
    ("adaptive-6-1e4", "adaptive-6.0-10000", BetaSchedule("adaptive", (6.0, 1e4))),
    ("dual-0-0.01", "dual-0-1e-2", BetaSchedule("dual", (0.0, 0.01))),
]
