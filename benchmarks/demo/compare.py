"""Makes the missing runs of the demonstration, checks the statements about them, and draws and prints the results."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.command_line import progress_of
from benchmarks.reporting import finished, write_json
from benchmarks.workers import Job, Pool, cores, pool

from . import plot, report, train
from .arms import Arm, Settings, fingerprint, sources

Runs = dict[str, dict[int, dict[str, Any]]]  # by arm name and seed


def compare(
    console: Console, arms: list[Arm], seeds: int, settings: Settings, folder: Path, workers: int, fresh: bool
) -> None:
    """Make the missing runs, and then check, draw and print the results of all runs."""
    start = time.perf_counter()
    code = sources()
    reference_file = folder / "reference.json"
    reference_key = fingerprint(settings, None, settings.pretrain_seed, code)
    model_folder = folder / "reference"
    runs: Runs = {arm.name: {} for arm in arms}
    missing: list[Missing] = []
    for seed in range(1, seeds + 1):  # seed by seed, so that an interrupted demo has complete comparisons
        for arm in arms:
            file, key = folder / "runs" / f"{arm.slug}-seed{seed}.json", fingerprint(settings, arm, seed, code)
            found = None if fresh else finished(file, key, "fingerprint")
            if found:
                runs[arm.name][seed] = found
            else:
                missing.append(Missing(arm, seed, file, key))
    kept = not fresh and (model_folder / "model.safetensors").exists()
    reference = finished(reference_file, reference_key, "fingerprint") if kept else None
    reused = seeds * len(arms) - len(missing)
    if missing or reference is None:
        workers = min(workers, max(len(missing), 1))
        console.print(f"{len(missing)} runs of {settings.steps} steps on {workers} workers; {reused} finished before")
        with pool(workers, folder / "logs") as crew, progress_of(console) as bars:
            if reference is None:
                made: list[dict[str, Any]] = []
                job = Job(
                    "reference", train.make_reference, (model_folder, settings), settings.pretrain_steps, made.append
                )
                crew.run_in_groups(bars, [("reference model", job)])
                reference = {**made[0], "fingerprint": reference_key}
                write_json(reference_file, reference)
            if missing:
                _train(crew, bars, missing, settings, model_folder, runs)
    assert reference is not None
    _conclude(console, arms, runs, settings, folder, reference, time.perf_counter() - start, workers, reused)


@dataclass(frozen=True)
class Missing:
    """A run that has to be made."""

    arm: Arm
    seed: int
    file: Path
    fingerprint: str

    @property
    def name(self) -> str:
        """The name of the run, for messages."""
        return f"{self.arm.name} seed {self.seed}"


def _train(crew: Pool, bars: Progress, missing: list[Missing], settings: Settings, folder: Path, runs: Runs) -> None:
    """Make the missing runs, and write each result as soon as the run has finished.

    Args:
        crew: the workers.
        bars: display of progress bars; it gets one bar for each arm.
        missing: the runs to make.
        settings: settings of the demo.
        folder: folder of the reference model.
        runs: gets the results.
    """

    def keep(run: Missing, result: dict[str, Any]) -> None:
        record = {**result, "arm": run.arm.name, "seed": run.seed, "fingerprint": run.fingerprint}
        write_json(run.file, record)
        runs[run.arm.name][run.seed] = record

    jobs = [
        Job(run.name, train.run, (run.arm, run.seed, settings, folder), settings.steps, partial(keep, run))
        for run in missing
    ]
    crew.run_in_groups(bars, [(run.arm.label, job) for run, job in zip(missing, jobs, strict=True)])


def _conclude(
    console: Console, arms: list[Arm], runs: Runs, settings: Settings, folder: Path, reference: dict[str, Any],
    seconds: float, workers: int, reused: int,
) -> None:  # fmt: skip
    """Check the statements, draw and print the results, and write the summary."""
    ends = report.finals(runs, settings.beta)
    found = report.checks(ends, reference["entropy"])
    text = report.sentence(found, settings.steps)
    seeds = len(next(iter(runs.values())))
    caption = (
        f"TRL {version('trl')}, {settings.prompts} prompts \u00d7 {settings.generations} completions per step, "
        f"\u03b2 = {settings.beta:g} everywhere. "
        f"The reference is rewarded in {reference['reward']:.1%} of its completions.\n"
        f"All values by enumerating the policy's completions; mean and range over {seeds} seed{'s' * (seeds > 1)}."
    )
    plot.draw(folder / "curves.png", runs, arms, reference, caption)
    backend, elsewhere = reference["backend"], ("machine", "backend", "plugin_log", "fingerprint")
    write_json(folder / "summary.json", {
        "settings": asdict(settings),
        "versions": {name: version(name) for name in ("kl-plugins", "trl", "transformers", "torch", "accelerate")},
        "machine": reference["machine"],
        "workers": workers,
        "wall_seconds": round(seconds, 1),
        "runs_reused": reused,
        "cpu_seconds": round(sum(r["cpu_seconds"] for by_seed in runs.values() for r in by_seed.values()), 1),
        "run_seconds": {name: [round(r["seconds"], 1) for r in by_seed.values()] for name, by_seed in runs.items()},
        "reference": {k: v for k, v in reference.items() if k not in elsewhere},
        "backend": backend,
        "notes": report.NOTES,
        "seeds": sorted(next(iter(runs.values()))),
        "arms": {
            name: {m: {"mean": sum(v) / len(v), "min": min(v), "max": max(v), "seeds": v} for m, v in measures.items()}
            for name, measures in ends.items()
        },
        "coverage_min": min(p["coverage"] for by_seed in runs.values() for r in by_seed.values() for p in r["curve"]),
        "plugin_log": {name: next(iter(by_seed.values()))["plugin_log"] for name, by_seed in runs.items()},
        "checks": [asdict(c) for c in found],
        "sentence": text,
    })  # fmt: skip
    console.print(report.table(ends, arms, reference, settings.beta))
    why = "" if backend["can_compile"] else f"; {backend['reason']}"
    console.print(
        f"kl-plugins ran its {backend['used']} path ({backend['tokens_per_call']} tokens per call; compiled from "
        f"{backend['compile_above']}){why}. {seconds:.0f} s on {workers} workers, {cores()} cores."
    )
    console.print(f"Written: {folder / 'curves.png'}, {folder / 'summary.json'}\n")
    console.print(text, style="bold", highlight=False)
