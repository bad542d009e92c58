"""veRL's real update, a Ray ``TrainingWorker``; ``python -m benchmarks.hosts.verl_update FIXTURE CASES OUT``.

The worker gets what veRL's trainer sends it. A KL in rewards or advantages goes through veRL's own
``apply_kl_penalty`` and ``compute_advantage`` first. Micro-batches of two, sequences packed without padding.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.verl.ray_support import CPU_HOST, ENVIRONMENT, cluster

os.environ.update(ENVIRONMENT)
sys.path.append(str(CPU_HOST))

import numpy as np
import ray
import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.hosts import verl_watch
from benchmarks.hosts.cases import BETA, Case
from benchmarks.hosts.fixture import GROUP, Rollouts
from benchmarks.hosts.records import Record, read_cases, save
from benchmarks.hosts.reference import pad
from kl_plugins import KLSpec
from tests.support.verl import remote
from tests.support.verl.workers import Batch, Group

UNCLIPPED: dict[str, Any] = {"clip_ratio": 1e6, "clip_ratio_low": 1e6, "clip_ratio_high": 1e6, "clip_ratio_c": 1e9}


class MicroBatches(Group):
    """A worker that accumulates the gradient over micro-batches of two."""

    def engine(self, ranks: int) -> Any:
        import dataclasses

        return dataclasses.replace(super().engine(ranks), micro_batch_size_per_gpu=2)


def advantages(case: Case, rollouts: Rollouts) -> list[Tensor]:
    """veRL's group advantages of a task reward of 0, with the KL that the case puts into rewards or advantages."""
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer

    from kl_plugins.adapters.verl.score import ScoreController

    if case.placement == "loss":
        return [torch.zeros(length) for length in rollouts.lengths]
    width = max(rollouts.lengths)
    mask = pad([torch.ones(length, dtype=torch.long) for length in rollouts.lengths], width)
    named = {"old_log_probs": rollouts.old, "ref_log_prob": rollouts.reference[case.scenario]}
    named["rollout_log_probs"] = rollouts.sampler
    tensors = {key: pad(rows, width) for key, rows in named.items()}
    tensors |= {"response_mask": mask, "token_level_scores": torch.zeros(mask.shape)}
    data = DataProto.from_single_dict(tensors)
    data.non_tensor_batch["uid"] = np.array([str(i // GROUP) for i in range(len(mask))], dtype=object)
    control: Any = core_algos.FixedKLController(BETA)
    if case.spec:
        control = ScoreController(KLSpec.parse(case.spec), control)
    kl = case.spec or case.native["estimator"]
    data, _ = ray_trainer.apply_kl_penalty(data, kl_ctrl=control, kl_penalty=kl)
    config = OmegaConf.create({"use_pf_ppo": False, "gamma": 1.0, "norm_adv_by_std_in_grpo": False})
    data = ray_trainer.compute_advantage(
        data, adv_estimator="grpo", num_repeat=GROUP, norm_adv_by_std_in_grpo=False, config=config
    )
    found = data.batch["advantages"]
    return [row[:length].float() for row, length in zip(found, rollouts.lengths, strict=True)]


def batch_of(case: Case, rollouts: Rollouts) -> Batch:
    """What veRL's trainer sends to its workers."""
    log_probs = {"old_log_probs": rollouts.old, "rollout_log_probs": rollouts.sampler}
    log_probs["ref_log_prob"] = rollouts.reference[case.scenario]
    masks = [torch.ones(length, dtype=torch.long) for length in rollouts.lengths]
    return Batch(rollouts.prompts, rollouts.responses, log_probs, masks, advantages(case, rollouts))


def update(case: Case, group: Group, rollouts: Rollouts) -> Record:
    """One case."""
    in_loss = case.placement == "loss"
    kl = (case.spec or case.native["estimator"]) if in_loss else None
    group.use(kl, kl_loss_coef=BETA, loss_agg_mode=case.aggregation, **UNCLIPPED)
    workers = group.workers.workers
    ray.get([worker.__ray_call__.remote(verl_watch.start) for worker in workers])
    step = group.step(batch_of(case, rollouts))
    ranks = ray.get([worker.__ray_call__.remote(verl_watch.stop) for worker in workers])
    record = Record.empty(case, rollouts.lengths)
    record.take(rollouts.index_of, ranks)
    record.gradient = step.gradient
    record.logged = float(step.metrics["kl_loss"]) if in_loss else None
    return record


def group_of(fixture: Path, ranks: int) -> Group:
    """Training workers with the near reference beside them, which exact terms need."""
    group = MicroBatches(str(fixture / "near" / "current"), ranks, packed=True)
    path = str(fixture / "near" / "reference")
    ray.get([worker.__ray_call__.remote(remote.add_reference, path) for worker in group.workers.workers])
    return group


def main(fixture: Path, cases: Path, output: Path) -> None:
    """All cases."""
    rollouts, records = Rollouts.load(fixture), []
    with cluster(remote, verl_watch):
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
