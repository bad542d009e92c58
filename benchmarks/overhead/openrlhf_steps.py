"""OpenRLHF's steps in its real actors; ``python -m benchmarks.overhead.openrlhf_steps PLAN FOLDER OUT``.

A step is ``BasePPOTrainer.train_step``: log-probs of policy and reference, advantages, one optimizer step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.drivers import openrlhf
from benchmarks.overhead import loaded, memory, work
from benchmarks.overhead.measure import Block
from benchmarks.overhead.plan import Pair, Plan
from tests.support.openrlhf.harness import Harness
from tests.support.openrlhf.rollouts import Rollouts


def flags(pair: Pair, spec: bool, sequences: int) -> list[str]:
    """Return OpenRLHF's command line."""
    one = ("--train.batch_size", "--train.micro_batch_size", "--rollout.micro_batch_size")
    found = [word for flag in one for word in (flag, str(sequences))]
    found += ["--rollout.batch_size", str(sequences // work.GROUP), "--train.max_epochs", "1"]
    found += ["--algo.kl.init_coef", str(work.BETA)]
    if spec:
        return found + openrlhf.kl_flags(pair.spec, in_loss=True)
    unbiased = bool(pair.native.get("unbiased_gradient"))
    return found + openrlhf.kl_flags(pair.native["estimator"], in_loss=True, unbiased_gradient=unbiased)


def rollouts_of(plan: Plan) -> Rollouts:
    """Return rollouts in the form of OpenRLHF's sampler."""
    given = work.tokens(plan.size, plan.seed)
    ids = [torch.cat(pair) for pair in zip(given.prompts, given.responses, strict=True)]
    masks = [(torch.arange(1, len(row)) >= plan.size.prompt).long() for row in ids]
    return Rollouts(ids, masks, given.rewards)


def main(plan: Path, folder: Path, output: Path) -> None:
    """Measure all pairs and write the blocks."""
    read = Plan.read(plan)
    rollouts = rollouts_of(read)
    with openrlhf.session(memory, loaded):
        host = Harness(folder)
        trainers: dict[tuple[str, bool], Any] = {}

        def started(pair: Pair, spec: bool) -> Any:
            trainer = host.start(flags(pair, spec, read.size.sequences))
            host.receipts(trainer)
            return trainer

        def timed(trainer: Any, indices: Iterable[int]) -> list[float]:
            seconds = []
            for index in indices:
                experiences = rollouts.experiences()
                start = time.perf_counter()
                trainer.train_step(experiences, index)
                seconds.append(time.perf_counter() - start)
            return seconds

        def run(pair: Pair, spec: bool) -> Block:
            key = pair.spec, spec
            if key in trainers:
                for ask in (host.ask, host.ask_reference):
                    ask(loaded.resume, key)
                (base,) = host.ask(memory.size)
                seconds = timed(trainers[key], range(1, 1 + read.steps))
            else:
                trainer = started(pair, spec)
                timed(trainer, [0])
                (base,) = host.ask(memory.restart)
                seconds = timed(trainer, range(1, 1 + read.steps))
                if read.loaded:
                    trainers[key] = trainer
                    for ask in (host.ask, host.ask_reference):
                        ask(loaded.keep, key)
            (peak,) = host.ask(memory.peak)
            return Block(seconds, peak, base)

        work.measure(read, run, output, version("openrlhf"))
        host.end()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
