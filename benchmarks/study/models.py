"""Reference models: they are made from a configuration or loaded, then trained on the lines of their task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.demo import evaluate, model
from benchmarks.demo.curve import Tick
from benchmarks.demo.train import load
from benchmarks.reporting import machine

from .measure import Measure
from .settings import SIZES, Settings
from .tasks import TASKS
from .text import encoded, tokenizer_of


def make_reference(folder: Path, name: str, family: str, settings: Settings, tick: Tick) -> dict[str, Any]:
    """Make or load the model, train it on its task's lines, save it, and return its description.

    Args:
        folder: folder for the model.
        name: name of the task.
        family: family of the model, if it is made here.
        settings: settings of the study.
        tick: called with the number of steps done.

    Raises:
        ValueError: if the reference is rewarded more or less often than its task says.
    """
    start, task, tokenizer = time.perf_counter(), TASKS[name], tokenizer_of(settings)
    reference = load(Path(settings.model)) if settings.model else model.blank_model(
        settings.pretrain_seed, family, *SIZES[settings.size]
    )  # fmt: skip
    reference.to(settings.device)
    ids, mask, phases, first = encoded(task, tokenizer)
    loss = model.fit(
        reference, ids, phases, first, settings.pretrain_steps, settings.pretrain_seed, tick,
        settings.pretrain_rate, mask,
    )  # fmt: skip
    reference.eval()
    measured = Measure(reference, task, settings, tokenizer)(reference)
    low, high = task.expected
    if settings.pretrain_steps >= Settings.pretrain_steps and not low <= measured["reward"] <= high:
        raise ValueError(f"the {family} reference of {name!r} is rewarded in {measured['reward']:.1%} of its "
                         f"completions; {low:.1%} to {high:.1%} is what the task is meant for")  # fmt: skip
    reference.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    described: dict[str, Any] = {
        "task": name, "family": family, "loss": loss, "seconds": time.perf_counter() - start, "machine": machine(),
        "parameters": sum(p.numel() for p in reference.parameters()), **measured,
    }  # fmt: skip
    if not settings.model:
        rewards = evaluate.walk(reference, reference, task.space()).rewards.clamp(1e-12, 1 - 1e-12)
        described["optimum"] = evaluate.optimum(rewards, settings.beta)
    return described
