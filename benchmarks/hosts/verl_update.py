"""veRL's real update in a Ray ``TrainingWorker``; ``python -m benchmarks.hosts.verl_update FIXTURE CASES OUT``.

The worker gets the data that veRL's trainer would send. A KL in rewards or advantages first goes through veRL's own
``apply_kl_penalty`` and ``compute_advantage``. Micro-batches have two sequences, which are packed without padding.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.drivers import verl
from benchmarks.hosts import verl_watch
from benchmarks.hosts.cases import BETA, Case
from benchmarks.hosts.fixture import GROUP, Rollouts
from benchmarks.hosts.records import Record, read_cases, save
from benchmarks.hosts.reference import pad
from kl_plugins import KLSpec
from tests.support.verl import remote
from tests.support.verl.workers import Batch, Group

UNCLIPPED: dict[str, Any] = {"clip_ratio": 1e6, "clip_ratio_low": 1e6, "clip_ratio_high": 1e6, "clip_ratio_c": 1e9}


def advantages(case: Case, rollouts: Rollouts) -> list[Tensor]:
    """Return veRL's group advantages for a task reward of 0, with the case's KL in rewards or advantages."""
    from verl.trainer.ppo import core_algos

    from kl_plugins.adapters.verl.score import ScoreController

    if case.placement == "loss":
        return [torch.zeros(length) for length in rollouts.lengths]
    width = max(rollouts.lengths)
    mask = pad([torch.ones(length, dtype=torch.long) for length in rollouts.lengths], width)
    named = {"old_log_probs": rollouts.old, "ref_log_prob": rollouts.reference[case.scenario]}
    named["rollout_log_probs"] = rollouts.sampler
    tensors = {key: pad(rows, width) for key, rows in named.items()}
    tensors |= {"response_mask": mask, "token_level_scores": torch.zeros(mask.shape)}
    control: Any = core_algos.FixedKLController(BETA)
    if case.spec:
        control = ScoreController(KLSpec.parse(case.spec), control)
    kl = case.spec or case.native["estimator"]
    algorithm = OmegaConf.create(
        {"adv_estimator": "grpo", "use_pf_ppo": False, "gamma": 1.0, "norm_adv_by_std_in_grpo": False}
    )
    found, _ = verl.advantages_of(tensors, GROUP, algorithm, kl, control)
    return [row[:length].float() for row, length in zip(found, rollouts.lengths, strict=True)]


def batch_of(case: Case, rollouts: Rollouts) -> Batch:
    """Return the batch that veRL's trainer would send to its workers."""
    log_probs = {"old_log_probs": rollouts.old, "rollout_log_probs": rollouts.sampler}
    log_probs["ref_log_prob"] = rollouts.reference[case.scenario]
    return verl.batch_of(rollouts.prompts, rollouts.responses, log_probs, advantages(case, rollouts))


def update(case: Case, group: Group, rollouts: Rollouts) -> Record:
    """Run one case and return its record."""
    in_loss = case.placement == "loss"
    kl = (case.spec or case.native["estimator"]) if in_loss else None
    group.use(kl, kl_loss_coef=BETA, loss_agg_mode=case.aggregation, **UNCLIPPED)
    group.ask(verl_watch.start)
    step = group.step(batch_of(case, rollouts))
    ranks = group.ask(verl_watch.stop)
    record = Record.empty(case, rollouts.lengths)
    record.take(rollouts.index_of, ranks)
    record.gradient = step.gradient
    record.logged = float(step.metrics["kl_loss"]) if in_loss else None
    return record


def group_of(fixture: Path, ranks: int) -> Group:
    """Return training workers that also hold the near reference, which exact terms need."""
    group = verl.Workers(str(fixture / "near" / "current"), ranks, micro_batch=2)
    group.ask(remote.add_reference, str(fixture / "near" / "reference"))
    return group


def main(fixture: Path, cases: Path, output: Path) -> None:
    """Run all cases and write their records."""
    rollouts, records = Rollouts.load(fixture), []
    with verl.session(verl_watch):
        groups: dict[int, Group] = {}
        for case in read_cases(cases):
            ranks = case.native.get("ranks", 1)
            if ranks not in groups:
                groups[ranks] = group_of(fixture, ranks)
            records.append(update(case, groups[ranks], rollouts))
            print(f"done {case.name}", flush=True)
        for group in groups.values():
            group.end()
    save(output, "verl", version("verl"), records)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
