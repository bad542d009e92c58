"""OpenRLHF's steps in its real actors; ``python -m benchmarks.overhead.openrlhf_steps PLAN FOLDER OUT``.

A step is ``BasePPOTrainer.train_step``: log-probs of policy and reference, advantages, one optimizer step.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tests.support.openrlhf.ray_support import CPU_HOST, ENVIRONMENT, local_cluster

os.environ.update(ENVIRONMENT)
sys.path.append(str(CPU_HOST))

import ray
import torch

from benchmarks.overhead import memory, work
from benchmarks.overhead.measure import Block
from benchmarks.overhead.plan import Pair, Plan
from tests.support.openrlhf.harness import Harness
from tests.support.openrlhf.rollouts import Rollouts


def flags(pair: Pair, spec: bool, sequences: int) -> list[str]:
    """OpenRLHF's command line."""
    one = ("--train.batch_size", "--train.micro_batch_size", "--rollout.micro_batch_size")
    found = [word for flag in one for word in (flag, str(sequences))]
    found += ["--rollout.batch_size", str(sequences // work.GROUP), "--train.max_epochs", "1", "--algo.kl.use_loss"]
    found += ["--algo.kl.init_coef", str(work.BETA)]
    found += ["--algo.kl.estimator", pair.spec if spec else pair.native["estimator"]]
    return found + (["--algo.kl.unbiased_gradient"] if not spec and pair.native.get("unbiased_gradient") else [])


def rollouts_of(plan: Plan) -> Rollouts:
    """What OpenRLHF's sampler would have given."""
    given = work.tokens(plan.size, plan.seed)
    ids = [torch.cat(pair) for pair in zip(given.prompts, given.responses, strict=True)]
    masks = [(torch.arange(1, len(row)) >= plan.size.prompt).long() for row in ids]
    return Rollouts(ids, masks, given.rewards)


def main(plan: Path, folder: Path, output: Path) -> None:
    """All pairs."""
    importlib.import_module("openrlhf_on_cpu").install()
    read = Plan.read(plan)
    rollouts = rollouts_of(read)
    with local_cluster(attached=True):
        ray.cloudpickle.register_pickle_by_value(memory)
        host = Harness(folder)

        def run(pair: Pair, spec: bool) -> Block:
            trainer = host.start(flags(pair, spec, read.size.sequences))
            host.receipts(trainer)
            base, seconds = 0, []
            for index in range(1 + read.steps):
                if index == 1:
                    (base,) = host.ask(memory.restart)
                experiences = rollouts.experiences()
                start = time.perf_counter()
                trainer.train_step(experiences, index)
                seconds.append(time.perf_counter() - start)
            (peak,) = host.ask(memory.peak)
            return Block(seconds[1:], peak, base)

        work.measure(read, run, output, version("openrlhf"))
        host.end()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
