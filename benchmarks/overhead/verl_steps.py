"""veRL's steps in a real training worker; ``python -m benchmarks.overhead.verl_steps PLAN FOLDER OUT``.

A step is the pass that scores the batch under the reference, and one optimizer step. The worker scores with its own
model, which has the size of a reference.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.drivers import verl
from benchmarks.overhead import memory, work
from benchmarks.overhead.measure import Block
from benchmarks.overhead.plan import Pair, Plan
from kl_plugins import KLSpec
from kl_plugins.adapters.verl.top_k import DRAWS_ASKED
from tests.support.verl.workers import Batch


def batch_of(plan: Plan) -> Batch:
    """Return the batch that veRL's trainer would send to its workers, with noise around uniform log-probs."""
    given, random = work.tokens(plan.size, plan.seed), torch.Generator().manual_seed(plan.seed)
    uniform = -float(torch.tensor(plan.size.vocabulary).log())

    def noise() -> list[Tensor]:
        return [uniform + 0.1 * torch.randn(len(row), generator=random) for row in given.responses]

    log_probs = {key: noise() for key in ("old_log_probs", "rollout_log_probs", "ref_log_prob")}
    advantages = [
        torch.full((len(row),), reward - 0.5) for row, reward in zip(given.responses, given.rewards, strict=True)
    ]
    return verl.batch_of(given.prompts, given.responses, log_probs, advantages)


def main(plan: Path, folder: Path, output: Path) -> None:
    """Measure all pairs and write the blocks."""
    read = Plan.read(plan)
    batch = batch_of(read)
    with verl.session(memory):
        from tests.support.verl import roles  # imports veRL, which the session prepares

        group = verl.Workers(str(folder / "model"))
        known: set[tuple[str, bool]] = set()

        def run(pair: Pair, spec: bool) -> Block:
            # If the arms take turns after each step, one model and one optimizer serve all of them.
            warm_up = 0 if read.loaded and (pair.spec, spec) in known else 1
            known.add((pair.spec, spec))
            word = pair.spec if spec else pair.native["estimator"]
            group.use(word, reset=bool(warm_up), kl_loss_coef=work.BETA)
            ours = KLSpec.parse(pair.spec) if spec and not pair.observes else None
            top = ours and ours.top
            notes = {DRAWS_ASKED: ours.draws} if ours is not None and ours.draws is not None else {}
            base, seconds = 0, []
            for index in range(warm_up + read.steps):
                if index == warm_up:
                    (base,) = group.ask(memory.restart if warm_up else memory.size)
                start = time.perf_counter()
                scored = roles.scored(batch, group.workers, top, "infer_batch", **notes)
                group.workers.train_mini_batch(scored.tensordict()).get()
                seconds.append(time.perf_counter() - start)
            (peak,) = group.ask(memory.peak)
            return Block(seconds[warm_up:], peak, base)

        work.measure(read, run, output, version("verl"))
        group.end()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
