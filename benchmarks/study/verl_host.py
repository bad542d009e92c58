"""One run in veRL: its own rewards, advantages and training worker, with completions from a sampler that may lag."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.demo.curve import Curve, Tick
from benchmarks.demo.train import load
from kl_plugins import KLSpec

from .measure import LOGGED, Measure
from .sampler import LaggedSampler
from .settings import Cell, Settings
from .tasks import TASKS
from .text import completion_tokens, tokenizer_of

if TYPE_CHECKING:
    from tests.support.verl.workers import Batch

CLIPPED = "actor/pg_clipfrac"
"""veRL's name for TRL's `clip_ratio/region_mean`."""


def run(
    cell: Cell, seed: int, settings: Settings, reference_folder: Path, tick: Tick,
    watch: Callable[[Batch, dict[str, float]], None] = lambda batch, metrics: None,
) -> dict[str, Any]:  # fmt: skip
    """Train one cell with one seed.

    Args:
        cell: the cell to train.
        seed: seed of the prompts and the rollouts.
        settings: settings of the study.
        reference_folder: folder in which the reference was saved.
        tick: called with the number of steps done.
        watch: called with the input and the metrics of each update.

    Returns:
        `curve` (the results of `Measure`, with `step` and averages of the log, by TRL's names), `seconds`,
        `cpu_seconds` (of this process and the worker), `evaluation_seconds`.

    Raises:
        ValueError: if kl-plugins rejects the spec in veRL, such as `@reward` with a delayed or bf16 sampler.
    """
    from . import verl_host_workers as workers

    if settings.optimizer != "adamw":
        raise ValueError(f"the study trains with {settings.optimizer} in TRL alone, not in veRL; use --host trl")
    if settings.device != "cpu":
        raise ValueError(f"the study trains in veRL on the CPU alone, not on {settings.device}; use --host trl")
    workers.start()  # This must come before the first import of veRL.
    from .verl_host_rollout import Trainer, actor_of, config_of

    task, tokenizer = TASKS[cell.task], tokenizer_of(settings)
    length = completion_tokens(task, settings, tokenizer)
    spec = None if cell.arm == "none" else KLSpec.parse(cell.arm)
    config = config_of(cell, spec, settings, length)
    policy, reference = (load(reference_folder).eval() for _ in range(2))
    trainer = Trainer(spec, config, reference, settings.generations)
    measure = Measure(reference, task, settings, tokenizer)
    curve = Curve(settings, lambda: measure(policy), tick, LOGGED)
    sampler = LaggedSampler(cell.delay, cell.precision, length, seed)
    batches = task.batches(settings.prompts, seed)
    sequences = task.prompts_per_step(settings.prompts) * settings.generations
    group = workers.workers_of(reference_folder, settings, sequences)
    cpu = time.process_time() + group.cpu_seconds()  # A new worker answers when it is ready.
    start = time.perf_counter()
    in_loss = str(spec) if spec and spec.placement == "loss" else None
    group.begin(reference_folder, in_loss, bool(spec and spec.needs_exact), **actor_of(settings, length))
    curve.measure(0)
    for step in range(1, settings.steps + 1):
        prompts = [prompt for prompt in next(batches) for _ in range(settings.generations)]
        drawn = sampler.draw(policy, tokenizer, prompts)
        texts = tokenizer.batch_decode(drawn.completion_lists(), skip_special_tokens=True)
        batch, metrics = trainer.prepare(policy, drawn, task.reward(prompts, texts))
        if spec is not None and spec.top is not None:
            batch = group.scored(batch, spec.top)
        metrics |= trainer.checked(group.train(batch))
        group.load_into(policy)
        metrics["clip_ratio/region_mean"] = metrics[CLIPPED]
        watch(batch, metrics)
        curve.log(metrics)
        curve.step(step)
    seconds, cpu = time.perf_counter() - start, time.process_time() + group.cpu_seconds() - cpu
    return {"curve": curve.points, "seconds": seconds, "cpu_seconds": cpu, "evaluation_seconds": curve.seconds}
