"""Real groups of veRL's Ray training workers on one fixed batch, without rollout and trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.verl import remote

BETA = 0.5
PROMPTS = (3, 5, 2, 4, 3, 2, 6, 4)
RESPONSES = (6, 4, 7, 5, 3, 8, 4, 6)
KEYS = ("old_log_probs", "rollout_log_probs", "ref_log_prob")


@dataclass(frozen=True)
class Batch:
    """Token ids and log-probs, one tensor per sequence; the log-probs lie around the initial policy's own.

    `extra` holds what veRL's trainer adds or replaces: ``response_mask`` after rejection, ``rollout_is_weights``.
    `left_right`: the older trainer's form, prompts padded on the left and responses on the right, ids packed by veRL.
    """

    prompts: list[Tensor]
    responses: list[Tensor]
    log_probs: dict[str, list[Tensor]]
    masks: list[Tensor]
    advantages: list[Tensor]
    extra: dict[str, list[Tensor]] = field(default_factory=dict)
    left_right: bool = False

    def padded(self, tensors: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    def tensordict(self) -> Any:
        """What veRL's trainer sends to its workers."""
        from tensordict import TensorDict
        from verl.utils import tensordict_utils

        def nested(tensors: list[Tensor]) -> Tensor:
            return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

        lengths = [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]
        count = len(lengths)
        data = (
            self._left_right()
            if self.left_right
            else TensorDict(
                {
                    "prompts": nested(self.prompts),
                    "responses": nested(self.responses),
                    "input_ids": nested([torch.cat(pair) for pair in zip(self.prompts, self.responses, strict=True)]),
                    "position_ids": nested([torch.arange(length) for length in lengths]),
                    "response_mask": nested(self.masks),
                    "loss_mask": nested(self.masks),
                    "advantages": nested(self.advantages),
                    **{key: nested(values) for key, values in {**self.log_probs, **self.extra}.items()},
                },
                batch_size=count,
            )
        )
        tensordict_utils.assign_non_tensor(
            data,
            temperature=1.0,
            calculate_entropy=False,
            global_batch_size=count,
            mini_batch_size=count,
            epochs=1,
            seed=1,
            dataloader_kwargs={"shuffle": False},
            compute_loss=True,
            distillation_use_topk=False,
            distillation_only=False,
        )
        return data

    def _left_right(self) -> Any:
        from verl.workers.utils.padding import left_right_2_no_padding

        return left_right_2_no_padding(self.left_and_right())

    def left_and_right(self) -> Any:
        """The batch of the older trainer: prompts padded on the left, responses on the right."""
        from tensordict import TensorDict

        def left(tensors: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side="left")

        prompts, responses = left(self.prompts), self.padded(self.responses)
        attended = [left([torch.ones_like(p) for p in self.prompts])]
        attended.append(self.padded([torch.ones_like(r) for r in self.responses]))
        attention_mask = torch.cat(attended, -1)
        fields = {"response_mask": self.masks, "advantages": self.advantages, **self.log_probs, **self.extra}
        return TensorDict(
            {
                "prompts": prompts,
                "responses": responses,
                "input_ids": torch.cat([prompts, responses], -1),
                "attention_mask": attention_mask,
                "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
                **{key: self.padded(values) for key, values in fields.items()},
            },
            batch_size=len(self.prompts),
        )


def without_last_token(batch: Batch, row: int) -> Batch:
    """The batch with a response that is one token shorter."""

    def shorter(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor[:-1] if index == row else tensor for index, tensor in enumerate(tensors)]

    return replace(
        batch,
        responses=shorter(batch.responses),
        log_probs={key: shorter(values) for key, values in batch.log_probs.items()},
        masks=shorter(batch.masks),
        advantages=shorter(batch.advantages),
    )


def with_scores(batch: Batch, output: Any) -> Batch:
    """The batch with what workers returned when they scored it under the reference.

    Args:
        batch: of which the reference's log-probs are replaced.
        output: the workers' output: log-probs of all tokens, and top-k numbers if they were asked for.
    """
    from kl_plugins.adapters.top_k import KEY

    rows = zip(output["log_probs"].unbind(), batch.prompts, strict=True)
    log_probs = {**batch.log_probs, "ref_log_prob": [row[len(prompt) - 1 : -1] for row, prompt in rows]}
    extra = {KEY: list(output[KEY].unbind())} if KEY in output.keys() else {}  # noqa: SIM118  TensorDict has no `in`
    return replace(batch, log_probs=log_probs, extra={**batch.extra, **extra})


def policy_logits(model: Any, prompts: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """Logits of the states that the response tokens were drawn in, with their graph."""
    return [
        model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def policy_log_probs(model: Any, prompts: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """Log-probs of the response tokens, with their graph."""
    return [
        logits.log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        for logits, response in zip(policy_logits(model, prompts, responses), responses, strict=True)
    ]


def make_batch(model: Any, *, advantages: bool = False) -> Batch:
    """A fixed batch; without advantages the policy-gradient loss and its gradient are zero."""
    random = torch.Generator().manual_seed(7)

    def tokens(length: int) -> Tensor:
        return torch.randint(4, model.config.vocab_size, (length,), generator=random)

    prompts, responses = [tokens(n) for n in PROMPTS], [tokens(n) for n in RESPONSES]
    with torch.no_grad():
        own = policy_log_probs(model, prompts, responses)
    # The rollout differs more from the policy than the old policy does, and the reference most.
    noise = zip(KEYS, (0.1, 0.3, 0.7), strict=True)
    log_probs = {k: [x + scale * torch.randn(x.shape, generator=random) for x in own] for k, scale in noise}
    score = [torch.randn(1, generator=random) * advantages for _ in RESPONSES]
    return Batch(
        prompts,
        responses,
        log_probs,
        [torch.ones(n, dtype=torch.long) for n in RESPONSES],
        [value.expand(n).contiguous() for value, n in zip(score, RESPONSES, strict=True)],
    )


@dataclass(frozen=True)
class Step:
    """One optimizer step: veRL's metrics, the gradient, the parameters after it."""

    metrics: dict[str, float]
    gradient: dict[str, Tensor]
    parameters: dict[str, Tensor]


SECONDS = 240
"""Longest wait for one call: a rank that waits for another is an error, and not a test that hangs."""


def answer(pending: Any) -> Any:
    """What a worker's call returned, or the text of its error."""
    import ray

    try:
        return ray.get(pending, timeout=SECONDS)
    except Exception as error:
        return str(getattr(error, "cause", error))


class Group:
    """A worker group of `ranks` processes.

    `sequence_parallel`: so many of them in a row share each sequence (Ulysses); sequences have to be packed then.
    `model`: further settings of the model.
    """

    def __init__(
        self,
        path: str,
        ranks: int,
        *,
        packed: bool,
        environment: dict[str, str] | None = None,
        nodes: int = 1,
        sequence_parallel: int = 1,
        **model: Any,
    ) -> None:
        import ray
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import HFModelConfig, TrainingWorkerConfig
        from verl.workers.engine_workers import TrainingWorker

        self.ranks, self.sequence_parallel = ranks, sequence_parallel
        # veRL exchanges tokens between the ranks of a sequence only around the functions of flash-attn.
        attention = "sdpa" if sequence_parallel == 1 else "flash_attention_2"
        config = TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=path,
                use_remove_padding=packed,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": attention},
                **model,
            ),
            engine_config=self.engine(ranks),
            optimizer_config=self.optimizer(),
            checkpoint_config=CheckpointConfig(),
        )
        self.pool = RayResourcePool([ranks // nodes] * nodes, use_gpu=False, max_colocate_count=1)
        self.workers = RayWorkerGroup(
            resource_pool=self.pool,
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(TrainingWorker), config=config),
            device_name="cpu",
            worker_env=environment or {},
        )

    def optimizer(self) -> Any:
        from verl.workers.config import FSDPOptimizerConfig

        return FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, clip_grad=1e9)

    def engine(self, ranks: int) -> Any:
        from verl.workers.config import FSDPEngineConfig

        return FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            mixed_precision={"param_dtype": "fp32"},
            use_torch_compile=False,
            use_dynamic_bsz=False,
            ulysses_sequence_parallel_size=self.sequence_parallel,
            # One micro-batch on one rank; on several, micro-batches of two.
            micro_batch_size_per_gpu=8 if ranks == 1 else 2,
            infer_micro_batch_size_per_gpu=8,
        )

    def use(self, kl: str | None, *, receipts: bool = True, reset: bool = True, **changes: Any) -> None:
        """Set the loss function and start again from the initial weights; None: no KL loss."""
        from verl.workers.config import FSDPActorConfig
        from verl.workers.utils.losses import ppo_loss

        from kl_plugins.adapters.verl import require_receipts

        config = FSDPActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=2,
            fsdp_config=self.engine(self.ranks),
            use_kl_loss=kl is not None,
            **{"kl_loss_type": kl or "low_var_kl", "kl_loss_coef": BETA, **changes},
        )
        if reset:
            self.workers.reset()
        self.workers.set_loss_fn(partial(ppo_loss, config=config))
        if kl is not None and "@" in kl and receipts:
            require_receipts(self.workers, kl)

    def end(self) -> None:
        """Give the processes and what they hold of the cluster back; without it, later groups may wait for ever."""
        import ray
        from ray.util import remove_placement_group

        for worker in self.workers.workers:
            ray.kill(worker)
        for held in self.pool.pgs or ():
            remove_placement_group(held)

    def train(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the batch, and veRL's metrics of it."""
        from verl.utils import tensordict_utils
        from verl.utils.metric import reduce_metrics

        output = self.workers.train_mini_batch(batch.tensordict()).get()
        metrics: dict[str, float] = reduce_metrics(tensordict_utils.get(output, "metrics"))
        return metrics

    def by_rank(self, data: Any) -> list[Any]:
        """What each worker's updates on its share of the data return, or the text of its error."""
        from verl.utils import tensordict_utils

        shares = tensordict_utils.chunk_tensordict(data, self.ranks // self.sequence_parallel)
        own = [shares[rank // self.sequence_parallel] for rank in range(self.ranks)]
        pending = [w.train_mini_batch.remote(share) for w, share in zip(self.workers.workers, own, strict=True)]
        return [answer(one) for one in pending]

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function says in each of the processes."""
        import ray

        return list(ray.get([worker.__ray_call__.remote(function, *arguments) for worker in self.workers.workers]))

    def step(self, batch: Batch) -> Step:
        """One optimizer step on the batch; the KL's metrics are those that veRL's trainers log."""
        from kl_plugins.adapters.verl.metrics import finish

        metrics = self.train(batch)
        finish(metrics, prefix="")
        return Step(metrics, *self.ask(remote.state)[0])

    def run(self, kl: str | None, batch: Batch, **changes: Any) -> Step:
        """One step from the initial weights."""
        self.use(kl, **changes)
        return self.step(batch)
