"""The findings as sentences, with their numbers and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

LIMITS = (
    "Ran away means: at the end the policy is further from the reference than the same run without a KL term. In one "
    "state the KL is bounded, so such a run does not diverge; it settles on a few tokens.",
    "A floor acts relative to the sampler: below p = floor * m it pulls like the unweighted term. It brings nothing "
    "back that the sampler itself no longer draws.",
    "One state and a table of logits: that the effect exists and why, not how large it is in a language model.",
)
"""Remarks that apply to all numbers."""

WEIGHTS = ("no weight", "token weight", "floor 0.2", "floor 0.5", "floor 1", "cap 2", "cap 1", "floor 0.5 and cap 2")


def findings(sweeps: Mapping[str, Sequence[Row]], forces: Iterable[Row]) -> list[dict[str, Any]]:
    """Return all findings in the order of the argument.

    Args:
        sweeps: rows of each sweep, by name of the sweep.
        forces: summaries of the curves.

    Returns:
        For each finding a name, its sentence, and the rows on which it is based.
    """
    noisy, adam = sweeps["noise, delay"], sweeps["adam, delay"]
    stale = min((row["value"] for row in noisy), key=lambda value: abs(value - 64))
    fresh = min(row["value"] for row in noisy)
    middle = min((row["value"] for row in noisy), key=lambda value: abs(value - 4))
    still = [row for name, rows in sweeps.items() if name.startswith("expectation") for row in rows]
    at_stale = [row for row in noisy if row["value"] == stale]
    without = at_stale[0]["final_kl_without_median"]
    medians = listed([row for row in at_stale if row["arm"] in WEIGHTS], lambda r: f"{r['final_kl']['median']:.2f}")
    return [
        *_of_forces(list(forces)),
        _largest("without noise", "Without sampling noise nothing pushes: the largest share that ran away", still),
        _at("noise", f"Noisy policy gradient (SGD), sampler renewed every {stale:g} updates; ran away", noisy, stale),
        {"name": "noise, medians", "rests_on": [], "says": f"The same, median KL at the end, nats: {medians}; "
         f"{without:.2f} without a KL term."},
        _at("noise, fresh", "The same on fresh data, where all weights are 1 and the terms are one term", noisy, fresh,
            WEIGHTS),
        _at("adam", f"KL term alone (Adam, one draw per update), sampler renewed every {stale:g} updates; ran away",
            adam, stale),
        _at("adam, middle", f"The same, renewed every {middle:g} updates (the sampler follows a token down, and the "
            "unweighted pull fades, too)", adam, middle),
        _extreme("adam, rate", "The same with the smallest step size", sweeps["adam, rate"], min),
        _extreme("adam, samples", "The same with the most draws per update", sweeps["adam, samples"], max),
        _extreme("adam, tokens", "The same with the largest vocabulary", sweeps["adam, tokens"], max, WEIGHTS),
        _extreme("sgd, rate", "SGD with the largest steps, KL term alone", sweeps["sgd, rate"], max, WEIGHTS),
    ]  # fmt: skip


def shown(row: Row) -> str:
    """Return a share and its interval in per cent."""
    return f"{100 * row['share']:.0f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def listed(rows: Sequence[Row], form: Any = shown) -> str:
    """List the arms with the text that ``form`` makes from their rows; neighbours with equal texts share it."""
    groups: list[tuple[str, list[str]]] = []
    for row in rows:
        text = form(row)
        if not groups or groups[-1][0] != text:
            groups.append((text, []))
        groups[-1][1].append(str(row["arm"]))
    return "; ".join(f"{' = '.join(arms)} {text}" for text, arms in groups)


def _at(
    name: str, text: str, rows: Sequence[Row], value: float, arms: Sequence[str] = (*WEIGHTS, "exact")
) -> dict[str, Any]:
    chosen = [row for row in rows if row["value"] == value and row["arm"] in arms]
    return {"name": name, "says": f"{text}: {listed(chosen)}.", "rests_on": _kept(chosen)}


def _extreme(name: str, text: str, rows: Sequence[Row], pick: Any, arms: Sequence[str] = ()) -> dict[str, Any]:
    value = pick(row["value"] for row in rows)
    if arms:
        return _at(name, f"{text} ({value:g})", rows, value, arms)
    return _largest(name, f"{text} ({value:g}), the largest share", [row for row in rows if row["value"] == value])


def _largest(name: str, text: str, rows: Sequence[Row]) -> dict[str, Any]:
    worst = max(rows, key=lambda row: float(row["share"]))
    count = len(rows)
    says = f"{text} of {count} cells of {worst['runs']} runs: {shown(worst)}, {worst['arm']}."
    return {"name": name, "says": says, "rests_on": _kept(rows)}


def _kept(rows: Sequence[Row]) -> list[dict[str, Any]]:
    kept = ("arm", "spec", "field", "value", "away", "runs", "share", "low", "high")
    return [{name: row[name] for name in kept} for row in rows]


def _of_forces(forces: Sequence[Row]) -> list[dict[str, Any]]:
    fixed = [row for row in forces if row["sampler_over_reference"] == 1.0]
    k2 = {row["treatment"]: row for row in fixed if row["estimator"] == "k2"}
    times = ", ".join(f"{name} {_time(k2[name]['time_back_from']['0.0001'])}" for name in k2 if name != "clip 0.2")
    weighted = [row for row in fixed if row["treatment"] == "token weight" and row["estimator"] not in ("k1", "k3+")]
    kept = {
        word: ", ".join(row["estimator"] for row in weighted if row["trend_to_zero"] == word) or "none"
        for word in ("grows", "holds", "fades")
    }
    peak = k2["token weight"]
    return [
        {"name": "well", "rests_on": [], "says": "r is a token's probability under the reference. Under the token "
         f"weight its pull is largest at u = {peak['u_of_largest_pull']:.2f} "
         f"({peak['largest_pull_below_reference']:.3f} r), and its well is {peak['depth_to_1e-6']:.3f} r deep."},
        {"name": "way back", "rests_on": [], "says": "Way back from r/10,000 to r/2 by the pull alone, in updates "
         f"times step size times r: {times}."},
        {"name": "divergences", "rests_on": [], "says": "As p goes to 0, the pull under the token weight grows for "
         f"{kept['grows']}, holds for {kept['holds']}, fades for {kept['fades']}."},
    ]  # fmt: skip


def _time(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
