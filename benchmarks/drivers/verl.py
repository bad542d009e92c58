"""veRL: its real Ray training workers on the CPU, the batches that its trainer sends to them, and its advantages."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.verl import remote
from tests.support.verl.ray_support import CPU_HOST, ENVIRONMENT, cluster
from tests.support.verl.workers import Batch, Group, with_scores


@cache
def prepare() -> None:
    """Prepare this process for veRL. Call it before veRL is imported."""
    os.environ.update(ENVIRONMENT)
    sys.path.append(str(CPU_HOST))


@contextmanager
def session(*modules: ModuleType) -> Iterator[None]:
    """Start a Ray cluster that ends with the ``with`` block. Functions of the modules are sent to workers by value."""
    prepare()
    with cluster(remote, *modules):
        yield


class Workers(Group):
    """A group of training workers.

    Args:
        path: folder of the model.
        ranks: number of workers.
        micro_batch: sequences of a micro-batch on each rank; None for eight on one rank and two on several ranks.
        packed: whether sequences are packed without padding.
    """

    def __init__(self, path: str, ranks: int = 1, *, micro_batch: int | None = None, packed: bool = True) -> None:
        self._micro_batch = micro_batch
        super().__init__(path, ranks, packed=packed)

    def engine(self, ranks: int) -> Any:
        """Return the settings of veRL's engine."""
        found = super().engine(ranks)
        if self._micro_batch is None:
            return found
        size = self._micro_batch
        return dataclasses.replace(found, micro_batch_size_per_gpu=size, infer_micro_batch_size_per_gpu=size)

    def scored(self, batch: Batch, k: int | None) -> Batch:
        """Let the reference model beside the policy score a batch, as veRL's trainer does before an update.

        Args:
            batch: of one worker, which holds a reference model (``remote.add_reference``).
            k: number of tokens per state of which the top-k numbers are asked for; None to ask for log-probs alone.

        Returns:
            The batch with the reference's log-probs, and its numbers if they were asked for.
        """
        from verl.utils import tensordict_utils

        from kl_plugins.adapters.verl.top_k import ASKED

        data = batch.tensordict()
        tensordict_utils.assign_non_tensor(data, compute_loss=False, **({} if k is None else {ASKED: k}))
        (output,) = self.ask(remote.score, data)
        return with_scores(batch, output)


def batch_of(
    prompts: list[Tensor], responses: list[Tensor], log_probs: dict[str, list[Tensor]], advantages: list[Tensor]
) -> Batch:
    """Return the batch that veRL's trainer sends to its workers if the policy wrote every token of the responses.

    Args:
        prompts: (P,) token ids of each sequence's prompt.
        responses: (T,) token ids of each response.
        log_probs: (T,) log-probs of each response, by veRL's names, nats.
        advantages: (T,) advantages of the tokens of each response.
    """
    masks = [torch.ones(len(row), dtype=torch.long) for row in responses]
    return Batch(prompts, responses, log_probs, masks, advantages)


def advantages_of(
    tensors: Mapping[str, Tensor], group: int, algorithm: Any, kl: str | None, control: Any
) -> tuple[Tensor, dict[str, float]]:
    """Compute advantages with veRL's own functions, after its KL penalty if there is one.

    Args:
        tensors: (B, T) ``response_mask``, ``token_level_scores``, and the log-probs that the penalty needs.
        group: number of responses per prompt, which are adjacent.
        algorithm: veRL's ``algorithm`` config.
        kl: the spec or veRL's name of an estimator, in the rewards or the advantages; None for no penalty.
        control: veRL's controller of beta.

    Returns:
        (B, T) advantages, and the metrics of the penalty.
    """
    from verl import DataProto
    from verl.trainer.ppo import ray_trainer

    uid = np.array([str(i // group) for i in range(len(tensors["response_mask"]))], dtype=object)
    data = DataProto.from_single_dict({**tensors, "uid": uid})
    metrics: dict[str, float] = {}
    if kl is None:
        data.batch["token_level_rewards"] = data.batch["token_level_scores"]
    else:
        data, metrics = ray_trainer.apply_kl_penalty(data, kl_ctrl=control, kl_penalty=kl)
    data = ray_trainer.compute_advantage(
        data, adv_estimator=algorithm.adv_estimator, num_repeat=group,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo, config=algorithm,
    )  # fmt: skip
    return data.batch["advantages"], metrics
