"""The whole study: it makes the missing runs, then judges all runs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.command_line import progress_of
from benchmarks.reporting import machine, write_json
from benchmarks.workers import Job, Pool, pool

from . import hosts, models, plan, summary
from .settings import Settings, sources


@dataclass(frozen=True)
class Options:
    """The options of the study.

    Attributes:
        seeds: number of seeds per cell.
        folder: folder of all output.
        workers: number of processes.
        fresh: whether to repeat finished runs.
        dry: whether to stop after the plan and its cost.
        command: the command that the user typed, for the report.
        smoke: whether to report that the verdicts have no meaning, because the runs are only a smoke test.
        judge_only: whether to judge only the existing runs, without new ones.
    """

    seeds: int
    folder: Path
    workers: int
    fresh: bool = False
    dry: bool = False
    command: str = ""
    smoke: bool = False
    judge_only: bool = False


@dataclass(frozen=True)
class Made:
    """The runs that exist after the missing runs were made.

    Attributes:
        found: records of the runs, by key; some are missing if no new runs were allowed.
        references: the models that the runs started from.
        reused: number of runs that existed before.
    """

    found: dict[str, dict[str, Any]]
    references: list[plan.Reference]
    reused: int


def complete(
    console: Console, planned: list[plan.Run], settings: Settings, options: Options, code: str
) -> Made:  # fmt: skip
    """Print the cost of the missing runs and make them, unless the options forbid it.

    Args:
        console: console to write to.
        planned: the runs, in the order in which they are made.
        settings: settings of all runs.
        options: options of the study.
        code: digest from `settings.sources`.
    """
    found = {} if options.fresh else {run.key: record for run in planned if (record := run.finished())}
    missing = [run for run in planned if run.key not in found]
    needed = plan.references(planned, settings, options.folder, code)
    models_missing = [m for m in needed if options.fresh or m.finished() is None]
    workers = max(1, min(options.workers, max(len(missing), len(models_missing))))
    seconds = plan.estimate(missing, list(found.values()), len(models_missing), settings, workers)
    console.print(
        f"{len(planned)} runs of {settings.steps} steps ({options.seeds} seeds), {len(found)} finished before; "
        f"{len(models_missing)} of {len(needed)} reference models to make. About {seconds / 60:.0f} min on {workers} "
        f"workers{'' if found else ' (a guess until runs are there to go by)'}."
    )
    if (missing or models_missing) and not (options.dry or options.judge_only):
        with pool(workers, options.folder / "logs") as crew, progress_of(console, remaining=True) as bars:
            if models_missing:
                _references(crew, bars, models_missing, settings)
            if missing:
                _train(crew, bars, missing, needed, settings, found)
    return Made(found, needed, len(planned) - len(missing))


def study(console: Console, scope: plan.Scope, settings: Settings, options: Options) -> None:
    """Plan the study, print its cost, make the runs, judge the claims, and write the results."""
    hosts.find_host(scope.host)
    start, code = time.perf_counter(), sources(scope.host)
    planned = plan.runs(scope, options.seeds, settings, options.folder, code)
    if not planned:
        raise ValueError("nothing to run: no cell has all of these tasks, arms and delays")
    made = complete(console, planned, settings, options, code)
    if options.dry:
        return
    if options.judge_only and not made.found:
        raise ValueError("there is no finished run to judge")
    described = {(m.task, m.family): m.finished() for m in made.references}
    data = summary.summarise(planned, made.found, plan.chosen_claims(scope), described, settings)
    data |= {
        "verdict": summary.sentence(data, options.smoke),
        "command": options.command,
        "machine": machine(),
        "versions": {name: version(name) for name in ("kl-plugins", scope.host, "transformers", "torch")},
        "seeds": options.seeds,
        "settings": asdict(settings),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "workers": options.workers,
        "runs_planned": len(planned),
        "runs": len(made.found),
        "runs_reused": made.reused,
    }
    write_json(options.folder / "study.json", data)
    drawn = _draw(options.folder, data)
    console.print(summary.table(data))
    console.print(data["verdict"], style="bold", highlight=False)
    console.print(f"Written: {options.folder / 'study.json'}{' and plots beside it' if drawn else ''}")
    if not drawn:
        console.print("No plots: matplotlib is not installed here")


def _draw(folder: Path, data: dict[str, Any]) -> bool:
    """Draw the plots if this environment can. The environment of a host may have no plotting library."""
    if find_spec("matplotlib") is None:
        return False
    from . import plot

    plot.draw_all(folder, data)
    return True


def _references(crew: Pool, bars: Progress, missing: list[plan.Reference], settings: Settings) -> None:
    def keep(model: plan.Reference, result: dict[str, Any]) -> None:
        write_json(model.file, {**result, "key": model.key})  # Written after the model: this file marks it as complete.

    jobs = [
        Job(f"reference {m.task} {m.family}", models.make_reference, (m.folder, m.task, m.family, settings),
            settings.pretrain_steps, partial(keep, m))
        for m in missing
    ]  # fmt: skip
    crew.run_in_groups(bars, [("reference models", job) for job in jobs])


def _train(
    crew: Pool, bars: Progress, missing: list[plan.Run], needed: list[plan.Reference], settings: Settings,
    found: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Make the missing runs, and write each run as soon as it is finished."""
    folders = {(m.task, m.family): m.folder for m in needed}

    def keep(run: plan.Run, result: dict[str, Any]) -> None:
        record = {**result, "cell": asdict(run.cell), "seed": run.seed, "key": run.key}
        write_json(run.file, record)
        found[run.key] = record

    jobs = [
        Job(run.name, hosts.train, (run.cell, run.seed, settings, folders[run.cell.task, run.cell.family]),
            settings.steps, partial(keep, run))
        for run in missing
    ]  # fmt: skip
    crew.run_in_groups(bars, [(run.cell.task, job) for run, job in zip(missing, jobs, strict=True)])
