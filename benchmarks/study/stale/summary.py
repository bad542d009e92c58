"""The summary of the runs.

It says how many runs ran away and how far, gives E[R] - beta KL of every run, and says which default follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.intervals import student

from . import rules
from .arms import NONE, Place
from .rules import Outcome


def row(place: Place, arm: str, found: rules.Found, known: Sequence[Outcome], beta: float) -> dict[str, Any]:
    """Return the summary of one arm in one place.

    Args:
        place: the place.
        arm: the arm.
        found: records of the runs.
        known: outcomes of the runs.
        beta: coefficient of the KL term.
    """
    runs = {seed: record["curve"] for (p, a, seed), record in sorted(found.items()) if (p, a) == (place, arm)}
    mine = [outcome for outcome in known if (outcome.place, outcome.arm) == (place, arm)]
    ends = [curve[-1] for curve in runs.values()]
    objectives = [end["reward"] - beta * end["kl"] for end in ends]
    low, high = student(objectives) if len(objectives) > 1 else (None, None)
    gap = next((gap for gap in rules.shortfalls(arm, at(known, place)) if gap.place == place), None)
    return {
        **asdict(place), "arm": arm, "seeds": [*runs],
        "reward": mean(end["reward"] for end in ends), "kl": mean(end["kl"] for end in ends),
        "objective": mean(objectives), "objective low": low, "objective high": high,
        "objectives": [round(value, 4) for value in objectives],
        "judged": len(mine), "ran away": [outcome.seed for outcome in mine if outcome.ran_away],
        "above": [outcome.seed for outcome in mine if outcome.above],
        "lost": [outcome.seed for outcome in mine if outcome.lost],
        "excursion": max((outcome.excursion for outcome in mine), default=None),
        "shortfall": gap and {"best": gap.best, "mean": gap.mean, "low": _finite(gap.low), "high": _finite(gap.high)},
        "step": [point["step"] for point in next(iter(runs.values()))],
        "kl curves": [[round(point["kl"], 3) for point in curve] for curve in runs.values()],
    }  # fmt: skip


def at(known: Sequence[Outcome], place: Place) -> list[Outcome]:
    """Return the outcomes of one place."""
    return [outcome for outcome in known if outcome.place == place]


def total(arm: str, known: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many runs of an arm ran away, over all places and over the places with stale data."""
    mine = [outcome for outcome in known if outcome.arm == arm]
    stale = [outcome for outcome in mine if outcome.place.delay]
    made: dict[str, Any] = {"arm": arm}
    for name, some in (("all", mine), ("stale", stale)):
        made[name] = {"runs": len(some)}
        for kind in ("ran_away", "above", "lost"):
            count = sum(getattr(outcome, kind) for outcome in some)
            made[name][kind] = {"count": count, "upper": rules.upper_bound(count, len(some)) if some else None}
        made[name]["excursion"] = max((outcome.excursion for outcome in some), default=None)
    return made


def part(found: rules.Found, known: Sequence[Outcome], beta: float) -> dict[str, Any]:
    """Return the rows and totals of the selection or of the confirmation.

    Args:
        found: records of its runs.
        known: outcomes of its runs.
        beta: coefficient of the KL term.
    """
    cells = dict.fromkeys((place, arm) for place, arm, _ in found)
    arms = [arm for arm in dict.fromkeys(arm for _, arm in cells) if arm != NONE]
    return {
        "rows": [row(place, arm, found, known, beta) for place, arm in cells],
        "totals": [total(arm, known) for arm in arms],
    }


def verdict(selected: Sequence[Outcome], again: Sequence[Outcome], chosen: str) -> dict[str, Any]:
    """Return the verdict of the rules.

    Args:
        selected: outcomes of the selection's runs.
        again: outcomes of the confirmation's runs. It is empty if there was no confirmation.
        chosen: the spec that was confirmed.
    """
    levels = {arm: rules.level(arm, selected) for arm in rules.ELIGIBLE}
    made = {
        "default": rules.choose(selected), "second": rules.second_choice(selected),
        "second confirmed": rules.second_confirmed(chosen, again) if again else None,
        "chosen": chosen, "levels": levels, "order": [arm for arm, _ in rules.order(selected)],
        "confirmed": rules.confirmed(chosen, selected, again) if again else None,
        "confirmation levels": {arm: rules.level(arm, again) for arm in dict.fromkeys(o.arm for o in again)},
    }  # fmt: skip
    return made | {"sentence": sentence(made)}


def sentence(found: Mapping[str, Any]) -> str:
    """Return the verdict in words."""
    chosen, reached = found["chosen"], found["levels"].get(found["chosen"], 0)
    if not found["order"]:
        said = f"No candidate reaches any level, so by the rule {found['default']} stays the default."
        if found["second"] is None:
            return said
        said += f" By the second rule it is {found['second']}."
        if found["second"] != chosen or found["second confirmed"] is None:
            return f"{said} That was not confirmed elsewhere."
        return f"{said} The confirmation {'holds' if found['second confirmed'] else 'FAILS'}."
    if not reached:
        return f"{chosen} reaches no level in the selection; the first that does is {found['order'][0]}."
    said = f"{chosen} is first among the candidates, at level {reached}: {rules.LEVELS[reached]}."
    if found["confirmed"] is None:
        return f"{said} It was not confirmed elsewhere."
    return f"{said} The confirmation {'holds' if found['confirmed'] else 'FAILS'}."


def totals_table(data: Mapping[str, Any], title: str) -> Table:
    """Return a table of how many runs on stale data ran away, with one row per arm."""
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    made.add_column("arm", no_wrap=True)
    for column in ("stale runs", "ran away (at most)", "KL above no KL's", "reward lost", "largest excursion"):
        made.add_column(column, justify="right", no_wrap=True)
    for found in data["totals"]:
        stale = found["stale"]
        if not stale["runs"]:
            continue
        away = stale["ran_away"]
        shown = f"{away['count']} ({away['upper']:.0%})"
        made.add_row(found["arm"], str(stale["runs"]), shown, str(stale["above"]["count"]),
                     str(stale["lost"]["count"]), f"{stale['excursion']:+.2f}")  # fmt: skip
    return made


def places_table(data: Mapping[str, Any], title: str) -> Table:
    """Return a table of reward, KL and E[R] - beta KL of every arm in every place."""
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    for column in ("place", "arm"):
        made.add_column(column, no_wrap=True)
    for column in ("reward", "KL", "E[R] - beta KL [95 %]", "short of the best [95 %]", "ran away", "excursion"):
        made.add_column(column, justify="right", no_wrap=True)
    for found in data["rows"]:
        place = Place(**{key: found[key] for key in ("task", "family", "delay", "rate")})
        gap, excursion = found["shortfall"], found["excursion"]
        away = f"{len(found['ran away'])} of {found['judged']}" if found["judged"] else ""
        made.add_row(
            str(place), found["arm"], f"{found['reward']:.2f}", f"{found['kl']:.2f}",
            _with_interval(found["objective"], found["objective low"], found["objective high"]),
            _with_interval(gap["mean"], gap["low"], gap["high"]) if gap else "", away,
            "" if excursion is None else f"{excursion:+.2f}",
        )  # fmt: skip
    return made


def _with_interval(middle: float, low: float | None, high: float | None) -> str:
    return f"{middle:+.3f}" if low is None or high is None else f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _finite(value: float) -> float | None:
    """Return the value, or None if it is infinite, because JSON has no infinity."""
    return value if math.isfinite(value) else None
