"""veRL's own workers by role, each in processes of its own, and the trainers' methods that send batches to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.verl.configs import composed
from tests.support.verl.main_ppo import SETTINGS
from tests.support.verl.workers import Batch, with_scores

FOREIGN = ("ray_kwargs", "+ray_kwargs", "++transfer_queue", "reward.", "trainer.device")
"""Settings that are not about models and batches."""


def config_of(model: str, **settings: Any) -> Any:
    """The config of veRL's program on this machine.

    Args:
        model: folder of the model.
        **settings: of ``actor_rollout_ref``, with ``__`` for dots.
    """
    general = {key: value for key, value in SETTINGS.items() if not key.startswith(FOREIGN)}
    own = {f"actor_rollout_ref.{key.replace('__', '.')}": value for key, value in settings.items()}
    merged = {**general, "actor_rollout_ref.model.path": model, "trainer.n_gpus_per_node": 1, **own}
    return composed(*(f"{key}={value}" for key, value in merged.items()))


class Role:
    """A group of one process of veRL's ``ActorRolloutRefWorker``.

    Args:
        role: ``ref`` or ``actor``.
        model: folder of the model.
        environment: further variables of the process.
        **settings: as in :func:`config_of`.
    """

    def __init__(self, role: str, model: str, environment: dict[str, str] | None = None, **settings: Any) -> None:
        import ray
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
        from verl.workers.engine_workers import ActorRolloutRefWorker

        self.config = config_of(model, **settings)
        self.pool = RayResourcePool([1], use_gpu=False, max_colocate_count=1)
        self.workers = RayWorkerGroup(
            resource_pool=self.pool,
            ray_cls_with_init=RayClassWithInitArgs(
                cls=ray.remote(ActorRolloutRefWorker), config=self.config.actor_rollout_ref, role=role
            ),
            device_name="cpu",
            worker_env=environment or {},
        )
        self.workers.init_model()

    def ask(self, function: Any, *arguments: Any) -> list[Any]:
        """What a function says in the process."""
        import ray

        return list(ray.get([worker.__ray_call__.remote(function, *arguments) for worker in self.workers.workers]))

    def end(self) -> None:
        """Give the process and what it holds of the cluster back."""
        import ray
        from ray.util import remove_placement_group

        for worker in self.workers.workers:
            ray.kill(worker)
        for held in self.pool.pgs or ():
            remove_placement_group(held)


def scored(batch: Batch, workers: Any, k: int | None, method: str = "compute_ref_log_prob", **notes: Any) -> Batch:
    """Let workers score a batch under the reference, as veRL's trainers do, and put what they return into it.

    Args:
        batch: of which the reference's log-probs are replaced.
        workers: the worker group.
        k: number of the reference's tokens to ask for; None to ask for log-probs alone.
        method: which of the workers' methods scores.
        **notes: further notes for the batch.
    """
    from verl.utils import tensordict_utils

    from kl_plugins.adapters.verl.top_k import ASKED

    data = batch.tensordict()
    asked = {} if k is None else {ASKED: k}
    tensordict_utils.assign_non_tensor(data, compute_loss=False, **asked, **notes)
    output = getattr(workers, method)(data)
    output = output.get() if hasattr(output, "get") and not hasattr(output, "keys") else output
    return with_scores(batch, output)


def numbers(batch: Batch, k: int) -> list[Tensor]:
    """The numbers that a batch carries, (T, 2 k + 1) per sequence."""
    from kl_plugins.adapters.top_k import KEY

    return [row.view(-1, 2 * k + 1) for row in batch.extra[KEY]]


def shifted(batch: Batch, k: int, row: int) -> Batch:
    """The batch with the numbers of one sequence moved by one token."""
    return _with_numbers(batch, k, row, lambda one: one.roll(1, 0))


def shortened(batch: Batch, k: int, row: int) -> Batch:
    """The batch without the numbers of one sequence's last token."""
    return _with_numbers(batch, k, row, lambda one: one[:-1])


def _with_numbers(batch: Batch, k: int, row: int, change: Callable[[Tensor], Tensor]) -> Batch:
    from kl_plugins.adapters.top_k import KEY

    changed = [change(one) if index == row else one for index, one in enumerate(numbers(batch, k))]
    return dataclasses.replace(batch, extra={**batch.extra, KEY: [one.flatten() for one in changed]})


def trainer_of(cls: Any, actor: Role, reference: Any, spec: str) -> Any:
    """One of veRL's trainers with these workers, without its data, rollout and loop.

    Args:
        cls: the trainer's class.
        actor: the actor's workers, which have given their receipts.
        reference: the group of the reference's workers.
        spec: a ``@loss`` spec, or a text with ``observe``.
    """
    from kl_plugins.adapters.verl import LOSS_KEY
    from kl_plugins.adapters.verl.config import Specs, spec_in
    from kl_plugins.adapters.verl.observe import observed_in
    from kl_plugins.patches.verl.trainer import ATTRIBUTE, TrainerSession

    made = cls.__new__(cls)
    made.config, made.actor_rollout_wg = actor.config, actor.workers
    made.ref_policy_wg, made.ref_in_actor = reference, False
    session = TrainerSession(Specs(spec_in(LOSS_KEY, spec), None), observed=observed_in(LOSS_KEY, spec))
    setattr(made, ATTRIBUTE, session)
    return made


def bucketed(models: Any, batch: Batch, k: int) -> float:
    """The mean over all tokens of the KL over set and bucket, nats."""
    with torch.no_grad():
        return float(by_formula(models, batch, k, None))


def by_formula(models: Any, batch: Batch, k: int, correction: str | None) -> Tensor:
    """The mean over all tokens of the top-k term, written out: its gradient is the spec's.

    Set and bucket take the weight before the token, the sample takes the token's too.

    Args:
        models: policy and reference.
        batch: its old policy is the one that drew the tokens.
        k: number of tokens.
        correction: of the spec: none, token, prefix or sequence; None to leave the sample out.
    """
    from tests.support.verl.workers import policy_logits

    policy, reference = (
        [logits.double() for logits in policy_logits(model, batch.prompts, batch.responses)] for model in models[:2]
    )
    total = torch.zeros((), dtype=torch.float64)
    for row, response in enumerate(batch.responses):
        logp, ref_logp = policy[row].log_softmax(-1), reference[row].detach().log_softmax(-1)
        chosen = ref_logp.topk(k, -1).indices
        inside = (chosen == response.unsqueeze(-1)).any(-1)
        p, r = logp.gather(-1, chosen).exp(), ref_logp.gather(-1, chosen).exp()
        tail = ((1 - p.sum(-1)) / (1 - r.sum(-1))).log()
        summed = (p * (p / r).log()).sum(-1) + (1 - p.sum(-1)) * tail
        if correction is None:
            total = total + summed.sum()
            continue
        own, ref = (values.gather(-1, response.unsqueeze(-1)).squeeze(-1) for values in (logp, ref_logp))
        sample = torch.where(inside, 0.0, (own - ref - tail).detach()) * own
        ratio = (own - batch.log_probs["old_log_probs"][row].double()).detach().exp()
        upto, one = ratio.cumprod(0), torch.ones_like(ratio)
        before = {"none": one, "token": one, "prefix": upto / ratio, "sequence": one * upto[-1]}[correction]
        including = {"none": one, "token": ratio, "prefix": upto, "sequence": before}[correction]
        total = total + (before * summed + including * sample).sum()
    return total / sum(len(response) for response in batch.responses)
