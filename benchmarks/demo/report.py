"""The results of the demonstration: a table, and a sentence in which every claim is a check on the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from .arms import K1_ADVANTAGE, K1_LOSS, K2_LOSS, NATIVE_K3, NONE, Arm

MEASURES = {
    "reward": "reward",
    "kl": "exact KL",
    "entropy": "entropy",
    "objective": "objective",
    "coef_std": "spread",
}
SAME = 0.25  # largest relative distance of mean KLs at which k1 as a loss is "like no KL"
HELD = 0.5  # share of the smallest KL without a regulariser; if the KL of every seed is below it, the arm "holds"
LOOSER = 1.1  # factor between the KLs of k3 and k2, in every seed
WIDER = 2.0  # factor between the coefficient spreads of k3 and k2, in every seed

NOTES = (
    "native-k3 is TRL's GRPO with use_bias_correction_kl=False; True has the gradient of k2@loss/is:token.",
    "The order of k3 and k2 belongs to this length and to a rare reward. k2 per token ignores what a token costs later "
    "and goes on rising: with --steps 900 both end near 3 nats, k3 with the higher reward.",
    "The spread is exact over the policy's tokens; most of k3's comes from tokens so rare that a batch seldom has one.",
    "Off-policy k1@loss does worse than no KL: its expected gradient then pushes away from the behaviour policy.",
)  # remarks that the sentence leaves out


@dataclass(frozen=True)
class Check:
    """A statement about the end of the runs, which was fixed before the runs."""

    name: str
    rule: str
    claim: str  # the text if the statement is true
    denial: str  # the text if it is not true
    holds: bool


Finals = dict[str, dict[str, list[float]]]


def finals(runs: dict[str, dict[int, dict[str, Any]]], beta: float) -> Finals:
    """Return the last values by arm and measure, one per seed.

    Args:
        runs: finished runs, by name of the arm and seed.
        beta: coefficient of the KL term, for the objective.
    """
    result: Finals = {}
    for name, by_seed in runs.items():
        ends = [by_seed[seed]["curve"][-1] for seed in sorted(by_seed)]
        for end in ends:
            end["objective"] = end["reward"] - beta * end["kl"]
        found = {m: [e[m] for e in ends if e[m] is not None] for m in MEASURES}
        result[name] = {m: values for m, values in found.items() if values}
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def checks(ends: Finals, reference_entropy: float) -> list[Check]:
    """Check the statements of the demo; statements about arms that were not run are left out.

    Args:
        ends: the values from `finals`.
        reference_entropy: entropy of the reference, nats per completion.
    """
    result: list[Check] = []
    none, k1 = ends.get(NONE.name), ends.get(K1_LOSS.name)
    k2, k3, advantage = ends.get(K2_LOSS.name), ends.get(NATIVE_K3.name), ends.get(K1_ADVANTAGE.name)
    if none and k1:
        far, near = _mean(none["kl"]), _mean(k1["kl"])
        values = f"KL {near:.1f} against {far:.1f} nats, entropy {_mean(k1['entropy']):.1f} against "
        values += f"{_mean(none['entropy']):.1f}, the reference's being {reference_entropy:.1f}"
        low = max(none["entropy"] + k1["entropy"]) < reference_entropy / 2
        result.append(Check(
            "k1@loss is like no KL",
            f"mean KLs within {SAME:.0%} of each other, and every seed's entropy below half the reference's",
            f"k1 as a loss ends like no KL at all ({values})",
            f"k1 as a loss does not end like no KL ({values})",
            abs(near - far) <= SAME * far and low,
        ))  # fmt: skip
    held = {label: arm for label, arm in (("k3", k3), ("k2", k2), ("k1@advantage", advantage)) if arm}
    if none and held:
        limit = HELD * min(none["kl"])
        bad = [n for n, a in held.items() if max(a["kl"]) > limit or min(a["entropy"]) < reference_entropy / 2]
        values = ", ".join(f"{n} {_mean(a['kl']):.1f}" for n, a in held.items())
        result.append(Check(
            "the others hold",
            "every seed's KL below half the smallest without a regulariser, entropy above half the reference's",
            f"{_listing(list(held))} hold (KL {values} nats)",
            f"{_listing(bad)} {'do' if len(bad) > 1 else 'does'} not hold (KL {values} nats)",
            not bad,
        ))  # fmt: skip
    if k2 and k3:
        values = (
            f"KL {_mean(k3['kl']):.1f} against {_mean(k2['kl']):.1f} nats, reward {_mean(k3['reward']):.2f} against "
        )
        values += f"{_mean(k2['reward']):.2f}"
        result.append(Check(
            "k3 is weaker than k2",
            f"every seed of k3 ends with a KL of at least {LOOSER:g} times that of every seed of k2",
            f"at the same beta k3 holds more loosely than k2 ({values})",
            f"k3 is not clearly looser than k2 ({values})",
            min(k3["kl"]) >= LOOSER * max(k2["kl"]),
        ))  # fmt: skip
        values = f"standard deviation {_span(k3['coef_std'])} against {_span(k2['coef_std'])} nats"
        result.append(Check(
            "k3's coefficient spreads more",
            f"in every seed at least {WIDER:g} times k2's largest",
            f"its coefficient spreads far more ({values})",
            f"its coefficient does not clearly spread more ({values})",
            min(k3["coef_std"]) >= WIDER * max(k2["coef_std"]),
        ))  # fmt: skip
    if advantage and (k2 or k3):
        rivals = [value for arm in (k2, k3) if arm for value in arm["objective"]]
        values = f"{_mean(advantage['objective']):.2f} against {max(rivals):.2f} at most"
        result.append(Check(
            "k1@advantage comes closest to the optimum",
            "every seed has a larger E[R] - beta KL than every seed of k2 and k3",
            f"k1@advantage, which alone counts later tokens, reaches the best E[R] - beta KL ({values})",
            f"k1@advantage does not clearly reach the best E[R] - beta KL ({values})",
            min(advantage["objective"]) > max(rivals),
        ))  # fmt: skip
    return result


def sentence(found: list[Check], steps: int) -> str:
    """Return one sentence with the claims of the true statements and the denials of the others."""
    if not found:
        return "The arms that were run have nothing to be compared with."
    held = [c.claim for c in found if c.holds]
    failed = [c.denial for c in found if not c.holds]
    text = "; ".join(held)
    if failed:
        text += ("; but " if held else "") + "; ".join(failed)
    return f"After {steps} steps {text}."


def table(ends: Finals, arms: list[Arm], reference: dict[str, Any], beta: float) -> Table:
    """Make the table of the final values of each arm, as mean and range over the seeds."""
    title = f"Exact values after training; objective: E[R] - {beta:g} KL"
    made = Table(title=title, box=box.SIMPLE, padding=0)  # narrow enough for 80 columns
    made.add_column("regulariser", style="bold", no_wrap=True)
    for heading, unit in zip(MEASURES.values(), ("share", "nats", "nats", "", "nats"), strict=True):
        made.add_column(f"{heading}\n[dim]{unit}[/dim]", justify="right", no_wrap=True)
    for arm in arms:
        made.add_row(arm.label, *(_cell(ends[arm.name].get(measure)) for measure in MEASURES))
    made.add_section()
    best = reference["optimum"]
    made.add_row("optimum", f"{best['reward']:.3f}", f"{best['kl']:.2f}", "", f"{best['objective']:.3f}", "")
    zero = reference["reward"]
    made.add_row("reference", f"{zero:.3f}", "0.00", f"{reference['entropy']:.2f}", f"{zero:.3f}", "")
    return made


def _cell(values: list[float] | None) -> str:
    if not values:
        return "-"
    return f"{_mean(values):.2f}\n[dim]{min(values):.2f}..{max(values):.2f}[/dim]"


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _listing(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
