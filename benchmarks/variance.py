"""Computes variance and bias of KL gradients by exact enumeration; run it by `python -m benchmarks.variance`.

The policies are tables, small enough to sum over every sequence, so the numbers have no sampling noise. They depend on
the problem, whose description is part of the output (tokens, positions, logit scale, seeds, KL to the reference).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.gradient_moments import (
    Blocks,
    Moments,
    exact_with_baseline,
    full_return,
    moments,
    of_spec,
    problem_at,
    staleness_kl,
)
from benchmarks.reporting import machine, write_json
from benchmarks.variance_plot import plot
from kl_plugins import KLSpec
from tests.support.oracle.enumeration import Problem

VOCAB, LOGIT_SCALE, STALENESS = 3, 1.0, 0.3
SETTINGS = ((4, 0.26), (6, 0.12), (6, 0.26))
"""Pairs of the number of positions and the KL of sequences to the reference in nats."""
SWEEP = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0)

OWN_EXPRESSIONS: dict[str, Blocks] = {
    "(k1, full return)": full_return,
    "(exact@loss/horizon:sequence, baseline)": exact_with_baseline,
}
ON_POLICY = (
    "(k1, full return)",
    "k1@reward",
    "k1@advantage/future:k3",
    "k1@advantage/future:exact",
    "exact@loss/horizon:sequence/future:k1",
    "exact@loss/horizon:sequence",
    "(exact@loss/horizon:sequence, baseline)",
    "k1@advantage/gamma:0.5",
    "k2@loss",
    "k3@loss",
    "exact@loss",
    "jeffreys@loss",
    "jsd@loss",
    "hellinger@loss",
    "k1@loss/allow:biased",
    "k3@reward/allow:biased",
)
OFF_POLICY = (
    "k2@loss",
    "k3@loss",
    "k2@loss/is:token",
    "k2@loss/is:token/cap:2",
    "k2@loss/is:prefix",
    "k2@loss/is:sequence",
    "k2@loss/horizon:sequence/is:token/allow:biased",
    "k2@loss/horizon:sequence/is:sequence",
    "k2@loss/horizon:sequence/is:decision",
    "k2@loss/horizon:sequence/future:k3/is:decision",
    "k2@loss/horizon:sequence/is:decision/cap:2",
    "exact@loss",
    "exact@loss/horizon:sequence/is:decision",
)


@dataclass(frozen=True)
class Setting:
    """A family of problems that differ only in the seed.

    Attributes:
        length: number of positions of a sequence.
        sequence_kl: KL of sequences from the policy to the reference, nats.
        data: the policy that the data come from, ``current`` or ``sampler``.
        rows: specs and own expressions to measure.
    """

    length: int
    sequence_kl: float
    data: str
    rows: tuple[str, ...]

    @property
    def title(self) -> str:
        """Description of the setting, for tables."""
        source = "on-policy" if self.data == "current" else "data from a stale, mismatched sampler"
        return f"V={VOCAB}, T={self.length}, {self.sequence_kl:g} nats per sequence to the reference, {source}"


def measure(row: str, problem: Problem, data: str) -> Moments:
    """Return the exact moments of one row on one problem."""
    blocks = OWN_EXPRESSIONS[row](problem) if row in OWN_EXPRESSIONS else of_spec(KLSpec.parse(row), problem, data)
    return moments(problem, blocks, data)


def target_of(row: str) -> str:
    """Return the declared target of a spec, or the target of one of the expressions that are not specs."""
    return "reverse_kl_sequence" if row in OWN_EXPRESSIONS else KLSpec.parse(row).target


def run_setting(setting: Setting, seeds: range, progress: Progress) -> dict[str, Any]:
    """Measure all rows of a setting on all seeds, and return the numbers of each seed and their medians."""
    task = progress.add_task(setting.title, total=len(seeds))
    samples: dict[str, list[Moments]] = {row: [] for row in setting.rows}
    sampler_kl = []
    for seed in seeds:
        problem = problem_at(setting.sequence_kl, VOCAB, setting.length, seed, scale=LOGIT_SCALE, staleness=STALENESS)
        sampler_kl.append(staleness_kl(problem))
        for row, found in samples.items():
            found.append(measure(row, problem, setting.data))
        progress.advance(task)
    names = tuple(Moments.__dataclass_fields__)
    rows = {
        row: {
            "target": target_of(row),
            **{name: median(getattr(sample, name) for sample in found) for name in names},
            "seeds": [asdict(sample) for sample in found],
        }
        for row, found in samples.items()
    }
    return {
        "title": setting.title,
        "vocab": VOCAB,
        "length": setting.length,
        "sequence_kl": setting.sequence_kl,
        "logit_scale": LOGIT_SCALE,
        "data": setting.data,
        "kl_current_to_sampler": None if setting.data == "current" else median(sampler_kl),
        "seed_numbers": list(seeds),
        "rows": rows,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print one setting as a table."""
    sampler = result["kl_current_to_sampler"]
    distance = "" if sampler is None else f" ({sampler:.2f} nats per sequence)"
    count = len(result["seed_numbers"])
    title = f"{result['title']}{distance}\nlogit scale {result['logit_scale']:g}, medians of {count} seeds"
    table = Table(title=title)
    table.add_column("spec", no_wrap=True)
    for column in ("variance", "bias seq", "bias tok", "err 64"):
        table.add_column(column, justify="right", no_wrap=True)
    for row, numbers in result["rows"].items():
        distances = [
            f"{numbers[name]:.1%}" if numbers[name] > 1e-9 else "0" for name in ("bias_sequence", "bias_token")
        ]
        distances.append(f"{numbers['error_64']:.2f}")
        if not numbers["target"].startswith("reverse_kl"):
            distances = [f"({distance})" for distance in distances]
        table.add_row(row, f"{numbers['variance']:.2f}", *distances)
    console.print(table)


def main(
    out: Annotated[Path, typer.Option(help="Folder for variance.json and variance.png.")] = Path("out/bench/variance"),
    seeds: Annotated[int, typer.Option(help="Problems per setting.", min=1)] = 12,
    smoke: Annotated[bool, typer.Option(help="Only test that it runs, with one small problem per setting.")] = False,
) -> None:
    """Compute variance and bias of the KL gradient of one sequence exactly, print tables and draw a figure."""
    torch.set_num_threads(1)
    settings = (
        [Setting(4, 0.26, "current", ON_POLICY[:6])]
        if smoke
        else [
            *(Setting(length, kl, "current", ON_POLICY) for length, kl in SETTINGS),
            *(Setting(length, kl, "sampler", OFF_POLICY) for length, kl in SETTINGS),
        ]
    )
    sweep = [Setting(4, kl, "current", ON_POLICY[:10]) for kl in (SWEEP[:2] if smoke else SWEEP)]
    numbers = range(1 if smoke else seeds)
    console = Console()
    with Progress(console=console) as progress:
        results = [run_setting(setting, numbers, progress) for setting in settings]
        swept = [run_setting(setting, numbers, progress) for setting in sweep]
    for result in results:
        show(result, console)
    console.print(
        "variance: trace of the covariance of one sequence's gradient over |gradient of the sequences' KL|^2; "
        "bias seq, bias tok: relative distance of its mean from the exact gradient of the sequences' KL, and from the "
        "token-local one; err 64: relative RMS error of a mean of 64 sequences as an estimate of the former. "
        "Numbers in brackets belong to specs with another target, for which the distance is not an error."
    )
    write_json(out / "variance.json", {"machine": machine(), "settings": results, "sweep": swept})
    plot(results, swept, out / "variance.png")
    console.print(f"wrote {out / 'variance.json'} and {out / 'variance.png'}")


if __name__ == "__main__":
    typer.run(main)
