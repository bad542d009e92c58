"""TRL's steps, rollouts and generation by table; ``python -m benchmarks.overhead.trl_steps PLAN FOLDER OUT``."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.drivers import trl
from benchmarks.overhead import memory, work
from benchmarks.overhead.measure import Block
from benchmarks.overhead.plan import Pair, Plan


class Clock(TrainerCallback):  # type: ignore[misc]
    """A callback that times every optimizer step, including the scoring of the rollout."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock before the rollout batch of the step."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock after the update."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


class Runner:
    """A runner of blocks of steps."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.tokens = work.tokens(plan.size, plan.seed)

    def __call__(self, pair: Pair, spec: bool) -> Block:
        """Run one block, with a new trainer each time, so that no arm inherits state."""
        size, clock, given = self.plan.size, Clock(), self.tokens
        trainer = trl.make_trainer(
            self.folder / "model", pair.spec if spec else None,
            trl.Responses(given.prompts, given.responses, None, work.GROUP),
            lambda completions, **_: given.rewards[: len(completions)],
            output_dir=str(self.folder / "out"), max_steps=1 + self.plan.steps, num_generations=work.GROUP,
            per_device_train_batch_size=size.sequences, max_completion_length=size.response, beta=work.BETA,
            learning_rate=1e-6, shuffle_dataset=False, use_cpu=not torch.cuda.is_available(),
            **({} if spec and not pair.observes else pair.native),
        )  # fmt: skip
        trainer.add_callback(clock)
        base = memory.restart()
        trainer.train()
        return Block(clock.seconds[1:], memory.peak(), base)


def main(plan: Path, folder: Path, output: Path) -> None:
    """Measure all pairs and write the blocks."""
    read = Plan.read(plan)
    work.measure(read, Runner(read, folder), output, version("trl"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
