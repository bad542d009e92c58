"""One run in TRL: its GRPO trainer, with completions from a sampler that may lag."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.demo.curve import Curve, Tick
from benchmarks.demo.train import load, settings_of_trl, watcher
from benchmarks.drivers.trl import classes

from .measure import LOGGED, Measure
from .sampler import LaggedSampler
from .settings import Cell, Settings
from .tasks import TASKS
from .text import completion_tokens, tokenizer_of


def against_the_sampler(trainer: Any) -> Any:
    """Return a trainer class whose policy-gradient ratio divides by the sampler's probabilities, not the policy's."""

    class AgainstTheSampler(trainer):  # type: ignore[misc]
        """A trainer for a sampler that differs from the rollout's policy; TRL assumes that they are the same."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
            return output

    return AgainstTheSampler


def run(
    cell: Cell, seed: int, settings: Settings, reference_folder: Path, tick: Tick,
    rollout: Callable[[LaggedSampler], Callable[..., Any]] = lambda sampler: sampler,
) -> dict[str, Any]:  # fmt: skip
    """Train one cell with one seed.

    With `@reward`, kl-plugins rejects a rollout function, so these runs sample with TRL's own generation. A delay or
    another precision is then an error.

    Args:
        cell: the cell to train.
        seed: seed of the rollouts.
        settings: settings of the study.
        reference_folder: folder in which the reference was saved.
        tick: called with the number of steps done.
        rollout: a wrapper of the sampler.

    Returns:
        `curve` (the results of `Measure`, with `step` and averages of TRL's log), `seconds`, `cpu_seconds`,
        `evaluation_seconds`.

    Raises:
        ValueError: if the sampler is delayed or in bf16 with `@reward`.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from kl_plugins.adapters.trl import detach

    own_sampler = not cell.arm.partition("@")[2].startswith("reward")
    if not own_sampler and (cell.delay, cell.precision) != (0, "fp32"):
        raise ValueError(f"{cell.arm} cannot be trained with a delayed or bf16 sampler in TRL: kl-plugins refuses "
                         "rollout_func under @reward; use @advantage or @loss")  # fmt: skip
    task, tokenizer = TASKS[cell.task], tokenizer_of(settings)
    policy, reference = (load(reference_folder).to(settings.device) for _ in range(2))
    length = completion_tokens(task, settings, tokenizer)
    measure = Measure(reference.eval(), task, settings, tokenizer)
    curve = Curve(settings, lambda: measure(policy), tick, LOGGED)
    arm = cell.regulariser
    trainer_class, config_class = classes(arm.spec)
    extra: dict[str, Any] = {}
    if own_sampler:
        trainer_class = against_the_sampler(trainer_class)
        extra["rollout_func"] = rollout(LaggedSampler(cell.delay, cell.precision, length, seed))
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as output:
            arguments = settings_of_trl(arm, seed, settings, output, length)
            arguments["use_cpu"] = settings.device == "cpu"
            if settings.optimizer != "adamw":  # TRL's default
                arguments["optim"] = settings.optimizer
            prompts = task.prompts_per_step(settings.prompts)
            arguments["per_device_train_batch_size"] = prompts * settings.generations
            trainer = trainer_class(
                policy,
                reward_funcs=task.reward,
                args=config_class(**arguments),
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in task.prompts]),
                processing_class=tokenizer,
                callbacks=[watcher(curve)],
                **extra,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        detach()  # The next run in this worker may use TRL's own KL.
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"curve": curve.points, "seconds": seconds, "cpu_seconds": cpu, "evaluation_seconds": curve.seconds}
