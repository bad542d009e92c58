"""Valid specs by the table of options: what a user may write, what it means, its canonical text. Never asks the parser.

Which values an option takes, and beside what, comes from its row; ``test_spec_contradictions.py`` compares that with
the rules of the design, which are written down there a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from kl_plugins import KLSpec
from kl_plugins.spec.option_row import OptionRow
from kl_plugins.spec.options import OPTIONS
from kl_plugins.spec.rules import contradictions
from kl_plugins.spec.weight_options import WEIGHT_OPTIONS

KL_ESTIMATORS = ("k1", "k2", "k3", "k3+", "abs")
F_DIVERGENCES = ("jeffreys", "jsd", "hellinger", "chi2", "alpha-0.5", "alpha-1", "alpha-2", "alpha-3")
SAMPLED = KL_ESTIMATORS + F_DIVERGENCES
PLACEMENTS = ("loss", "reward", "advantage")
ORDER = list(OPTIONS)

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
"""Shortest text of a number -> ways to write it, beside those in the table."""


@dataclass(frozen=True)
class Written:
    """A spec as a user could write it."""

    text: str
    canonical: str
    fields: dict[str, Any]


def default_horizon(placement: str) -> str:
    """The horizon of a spec that names none."""
    return "sequence" if placement == "advantage" else "token"


def default_future(estimator: str, horizon: str) -> str | None:
    """The future term of a spec that names none."""
    if horizon == "token":
        return None
    return "own" if estimator in F_DIVERGENCES else "exact" if estimator == "exact" else "k1"


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
    spec = KLSpec(estimator, placement)
    chosen: dict[str, tuple[str, Any]] = {}  # option -> canonical value and what it means
    for row in OPTIONS.values():
        if row.default is not None:
            spec = replace(spec, **{row.attribute: row.default(spec)})
        wanted = () if row.name == "allow" else row.values.examples
        fitting = [e for e in wanted if (exact or e[2] != "exact") and fits(spec, chosen, row, e)]
        if fitting and draw(st.booleans()):
            canonical, _, value = draw(st.sampled_from(fitting))
            chosen[row.name] = (canonical, value)
            spec = replace(spec, **{row.attribute: value})
    horizon = chosen.get("horizon", ("", default_horizon(placement)))[1]
    defaults = {"horizon": default_horizon(placement), "future": default_future(estimator, horizon)}
    correction = chosen.get("is", ("", "none"))[1]
    if is_biased(estimator, placement, horizon, correction, clipped="clip" in chosen):
        chosen["allow"] = ("biased", True)
    canonical = {
        name: value
        for name, (value, parsed) in chosen.items()
        if parsed != defaults.get(name, getattr(KLSpec, OPTIONS[name].attribute, None))
    }
    order = draw(st.permutations(sorted(chosen)))
    aliases = {"alpha-0.5": "alpha-.50", "alpha-2": "alpha-2.0"}
    head = aliases.get(estimator, estimator) if draw(st.booleans()) else estimator
    fields = {OPTIONS[name].attribute: parsed for name, (_, parsed) in chosen.items()}
    return Written(
        f"{head}@{placement}" + "".join(draw(spellings(OPTIONS[name], chosen[name][0])) for name in order),
        f"{estimator}@{placement}" + "".join(_option(name, canonical[name]) for name in ORDER if name in canonical),
        {"estimator": estimator, "placement": placement} | defaults | fields,
    )


def fits(spec: KLSpec, chosen: dict[str, Any], row: OptionRow, example: tuple[str, str, Any]) -> bool:
    """Whether the table allows an option with this value beside those that are chosen already."""
    candidate = replace(spec, **{row.attribute: example[2]})
    return not any(name for name, _, _ in contradictions(candidate, [*chosen, row.name]))


def spellings(row: OptionRow, canonical: str) -> st.SearchStrategy[str]:
    """Ways to write an option with its slash."""
    others = [other for short, other, _ in row.values.examples if short == canonical]
    values = dict.fromkeys([canonical, *others, *NUMBERS.get(canonical, ())])
    return st.sampled_from([_option(name, value) for name in (row.name, *row.other_names) for value in values])


def _option(name: str, value: str) -> str:
    return f"/{name}:{value}" if value else f"/{name}"


@dataclass(frozen=True)
class Combination:
    """Any estimator, placement and options, valid or not."""

    estimator: str
    placement: str
    options: dict[str, Any]

    @property
    def text(self) -> str:
        """The spec, with ``allow:biased`` where the theory asks for it."""
        return "/".join([f"{self.estimator}@{self.placement}", *self._options()])

    def _options(self) -> Iterator[str]:
        for name, (canonical, _) in self.options.items():
            yield _option(name, canonical)[1:]
        horizon = self.value("horizon", default_horizon(self.placement))
        correction = self.value("is", "none")
        if is_biased(self.estimator, self.placement, horizon, correction, clipped="clip" in self.options):
            yield "allow:biased"

    def value(self, name: str, default: Any = None) -> Any:
        """What an option means, or a default where it is not written."""
        return self.options[name][1] if name in self.options else default


@st.composite
def combinations(draw: st.DrawFn) -> Combination:
    """A few options with values from the table, whatever they mean together; often what acts on a token weight."""
    weighted = draw(st.booleans())
    wanted = ["horizon", *(row.name for row in WEIGHT_OPTIONS if row.name != "is")] if weighted else [*ORDER]
    names = draw(st.lists(st.sampled_from([name for name in wanted if name != "allow"]), max_size=4, unique=True))
    examples = {name: draw(st.sampled_from(OPTIONS[name].values.examples)) for name in names}
    options = {name: (canonical, value) for name, (canonical, _, value) in examples.items()}
    return Combination(
        draw(st.sampled_from((*SAMPLED, "exact"))),
        "loss" if weighted else draw(st.sampled_from(("loss", *PLACEMENTS))),
        ({"is": ("token", "token")} if weighted else {}) | options,
    )
