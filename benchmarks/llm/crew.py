"""Makes runs in worker processes within a time limit, the most important first; finished runs are stored at once."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.command_line import progress_of
from benchmarks.reporting import finished, write_json
from benchmarks.workers import Job, cores, pool

from . import train
from .settings import RUN_FILES, Settings, run_key, slug, sources
from .train import Tick

MARGIN = 1.2  # a run is expected to take at most this factor times the longest earlier run of its worker
_longest = 0.0


@dataclass(frozen=True)
class Run:
    """One run, and the file of its record."""

    arm: str
    seed: int
    settings: Settings
    file: Path
    key: str

    @property
    def name(self) -> str:
        """The name of the run, for messages."""
        delay = "" if self.settings.delay is None else f" delay {self.settings.delay}"
        return f"{self.arm}{delay} seed {self.seed}"

    def record(self) -> dict[str, Any] | None:
        """Return the result of the run, or None if there is none yet."""
        return finished(self.file, self.key)


def planned(wanted: Sequence[tuple[str, int, Settings]], folder: Path) -> list[Run]:
    """Return the runs of arms, seeds and settings, in the given order.

    Args:
        wanted: arm, seed and settings of each run.
        folder: folder of their records.
    """
    code = sources(RUN_FILES)
    made = []
    for arm, seed, settings in wanted:
        delay = "" if settings.delay is None else f"-delay{settings.delay}"
        key = run_key(settings, arm, seed, code)
        made.append(Run(arm, seed, settings, folder / "runs" / f"{slug(arm)}{delay}-seed{seed}-{key[:8]}.json", key))
    return made


def work(
    console: Console, runs: Sequence[Run], folder: Path, workers: int, seconds: float | None = None,
    done: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Make the runs that are missing.

    Args:
        console: console that shows the progress.
        runs: the runs in the order of their importance.
        folder: folder for logs.
        workers: number of processes.
        seconds: time limit; a run that would probably end later is not started. None makes all runs.
        done: function that is called after each run.

    Returns:
        The runs that are missing afterwards, each with the reason: the time limit, or an error. An error does not stop
        the other runs.
    """
    missing = [run for run in runs if run.record() is None]
    console.print(f"{len(missing)} of {len(runs)} runs to be made, {workers} at a time")
    if not missing:
        return []
    deadline = None if seconds is None else time.time() + seconds
    threads = 1 if missing[0].settings.device == "cuda" else max(1, cores() // workers)
    failures: list[str] = []
    reached: dict[str, int] = {}
    with pool(workers, folder / "logs") as crew, progress_of(console) as bars:
        total = bars.add_task("all runs", total=sum(run.settings.steps for run in missing))
        tasks: dict[str, Any] = {}

        def show(name: str, steps: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"  {name}", total=max(steps, missing[0].settings.steps))
            bars.update(tasks[name], completed=steps)
            reached[name] = max(steps, reached.get(name, 0))
            bars.update(total, completed=sum(reached.values()))

        def keep(run: Run, result: dict[str, Any]) -> None:
            if "missing" in result:
                failures.append(f"{run.name}: {result['missing']}")
                console.print(failures[-1], style="red", markup=False, highlight=False)
            else:
                about = {"arm": run.arm, "seed": run.seed, "delay": run.settings.delay, "key": run.key}
                write_json(run.file, {**about, **result})
            if run.name in tasks:
                bars.update(tasks[run.name], visible=False)
            done()

        crew.run(
            [
                Job(run.name, attempt, (run.arm, run.seed, run.settings, threads, deadline), run.settings.steps,
                    partial(keep, run))
                for run in missing
            ],
            show,
        )  # fmt: skip
    return failures


def attempt(
    arm: str, seed: int, settings: Settings, threads: int, deadline: float | None, tick: Tick
) -> dict[str, Any]:  # fmt: skip
    """Make one run unless it would end too late; an error is returned, so that it does not stop other runs."""
    global _longest
    start = time.time()
    if deadline is not None and start + _longest * MARGIN >= deadline:
        return {"missing": "not begun, as the time was over"}
    try:
        made = train.run(arm, seed, settings, threads, tick)
    except Exception as error:
        traceback.print_exc()
        return {"missing": f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0]}"}
    finally:
        _tidy_up()
    _longest = max(_longest, time.time() - start)
    return made


def _tidy_up() -> None:
    """Free the memory of a run; a garbage collection is necessary, because trainers, models and graphs form cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
