"""The demonstration: SmolLM2 trained by TRL's GRPO without a KL term, with TRL's own KL, and under two specs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.reporting import write_json
from benchmarks.workers import WorkerError

from . import demo_plot, demo_report
from .crew import Run, planned, work
from .settings import HOST, NONE, Settings, versions
from .tasks import TASKS
from .train import typical

ARMS = (NONE, HOST, "default", "exact@loss")
SEED = 1
CPU = Settings()
GPU = Settings(device="cuda", steps=80, prompts=8, generations=8, evaluate_every=20, delay=0)
SMOKE = Settings(steps=4, prompts=2, generations=2, tokens=6, evaluate_every=2, evaluation_samples=1)


def demonstrate(
    console: Console, arms: tuple[str, ...], settings: Settings, folder: Path, workers: int, fresh: bool = False
) -> dict[str, Any]:
    """Make the missing runs, write records, table and picture, and print the results.

    Args:
        console: console for the output.
        arms: names of the arms.
        settings: settings of every run.
        folder: folder for all files.
        workers: number of processes; several processes share the machine, so that step times are not comparable.
        fresh: whether to repeat finished runs.

    Returns:
        The content of `summary.json`.
    """
    runs = planned([(arm, SEED, settings) for arm in arms], folder)
    if fresh:
        for run in runs:
            run.file.unlink(missing_ok=True)
    missing = work(console, runs, folder, workers)
    if missing:
        raise WorkerError("\n".join(missing) + f"\nsee {folder / 'logs'}; finished arms are kept")
    found = summary(runs, settings, workers)
    write_json(folder / "summary.json", found)
    demo_plot.draw(folder / "curves.png", found)
    text = demo_report.text(found)
    (folder / "table.txt").write_text(text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {folder / 'summary.json'}, {folder / 'table.txt'}, {folder / 'curves.png'}")
    return found


def summary(runs: list[Run], settings: Settings, workers: int) -> dict[str, Any]:
    """Summarise the finished runs."""
    records = {run.arm: run.record() or {} for run in runs}
    first = next(iter(records.values()))
    return {
        "settings": asdict(settings),
        "versions": versions(),
        "machine": first["machine"],
        "workers": workers,
        "seed": SEED,
        "task": {"name": settings.task, "reward": TASKS[settings.task].meaning},
        "arms": {arm: _arm(record) for arm, record in records.items()},
        "plugin_log": {arm: record["plugin_log"] for arm, record in records.items()},
    }


def _arm(record: dict[str, Any]) -> dict[str, Any]:
    curve = record["curve"]
    return {
        "curve": [{k: v for k, v in point.items() if k != "texts"} for point in curve],
        "before": curve[0]["texts"],
        "after": curve[-1]["texts"],
        "step_seconds": typical(record["step_seconds"]),
        "seconds": round(record["seconds"], 1),
        "evaluation_seconds": round(record["evaluation_seconds"], 1),
        "peak_bytes": record["peak_bytes"],
    }
