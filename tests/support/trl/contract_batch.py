"""Requests of the contract on TRL's real trainer: one fixed batch, ``GRPOTrainer.train()``, and what came of it.

The trainer is TRL's in all but one method: where it would generate, it hands over the batch that was built by hand.
``contract_driver.py`` calls this in its own process, ``contract_worker.py`` in each of two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from tests.contract.driver import Fault, Outcome, Request
from tests.support import garbage
from tests.support.trl import trainers

LENGTHS = (8, 7, 6, 5, 4, 3, 2, 1)
"""Tokens of each response: the first half has more of them than the second."""

PROMPT, LONGEST = 3, max(LENGTHS)
POSITION = 1
"""The response token of a rank's first row that a fault hits."""

TIMING = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def no_rollout(prompts: Any, trainer: Any) -> Any:
    """Stands for a user's rollout function, which gives the sampler's log-probs; a fixed batch never calls it."""
    raise AssertionError("the batch is fixed")


def ours() -> tuple[type, type]:
    """Trainer and config with the ``kl`` field."""
    from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig


def outcome(
    request: Request, model: str, folder: Path, kinds: tuple[type, type] | None = None, everything: bool = False
) -> Outcome:
    """This process's part of a request.

    Args:
        request: what to do.
        model: folder of the model.
        folder: for the trainer's output.
        kinds: trainer and config; kl-plugins' own by default.
        everything: all logged numbers, not only the ``kl/`` metrics.
    """
    rank, steps = int(os.environ.get("RANK", 0)), len(request.betas)
    trainer = _built(request, model, folder, *(kinds or ours()))
    watch = _Watch(trainer, request.betas, request.garbage)
    trainer.add_callback(watch)
    fault = request.fault if request.fault is not None and request.fault.rank == rank else None
    batches = _micro_batches(trainer, request, rank)
    faulty = [dict(batch) for batch in batches]
    _break(faulty[0], fault)
    trainer.fixed = lambda: faulty if trainer.state.global_step == steps - 1 else batches

    def now() -> bool:
        return torch.is_grad_enabled() and trainer.state.global_step == steps - 1

    with broken(trainer.model, fault if fault is not None and fault.whose == "policy" else None, now):
        error = attempted(trainer)
    gradient = None if error else watch.gradient
    return Outcome((error,), watch.changed(), logged(trainer, everything), gradient, watch.garbage)


def attempted(trainer: Any, **arguments: Any) -> str | None:
    """Train; the text of the error that stopped it, or None."""
    try:
        trainer.train(**arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def logged(trainer: Any, everything: bool = False) -> tuple[dict[str, float], ...]:
    """What was logged, by step."""
    return tuple(
        {
            key: value
            for key, value in entry.items()
            if (everything and key not in TIMING) or (not everything and key.startswith("kl/"))
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    )


@contextmanager
def broken(model: Any, fault: Fault | None, now: Any) -> Iterator[None]:
    """Within the block, and while ``now()`` holds, one token's logits are not finite.

    Args:
        model: whose last hidden state is broken, one token before the token at :data:`POSITION` of the first row.
        fault: the value; None breaks nothing.
        now: whether to break a forward pass.
    """

    def after_backbone(module: Any, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        if fault is not None and now():
            hidden = hidden.clone()
            hidden[0, hidden.shape[1] - LONGEST + POSITION - 1] = fault.value
            output.last_hidden_state = hidden
        return output

    handle = model.base_model.register_forward_hook(after_backbone)
    try:
        yield
    finally:
        handle.remove()


def _built(request: Request, model: str, folder: Path, trainer: type, config: type) -> Any:
    class Fixed(trainer):  # type: ignore[valid-type, misc]
        """TRL's trainer, with a batch where it would generate one."""

        fixed: Any = None

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return self.fixed()[self._step % self.args.gradient_accumulation_steps]

    Fixed.__name__ = trainer.__name__
    rows = len(LENGTHS) // (request.ranks * request.micro_batches)
    settings = trainers.settings(
        folder, beta=request.betas[0], max_steps=len(request.betas), per_device_train_batch_size=rows,
        gradient_accumulation_steps=request.micro_batches, num_generations=2, num_iterations=2, learning_rate=1e-2,
        max_grad_norm=0.0, max_completion_length=LONGEST, use_bias_correction_kl=False,
    )  # fmt: skip
    if request.spec is not None:
        settings["kl"] = request.spec
    extra = {"rollout_func": no_rollout} if request.sampler and request.spec is not None else {}
    torch.manual_seed(0)
    return Fixed(
        model, trainers.zero_reward, args=config(**settings), train_dataset=trainers.prompts(len(LENGTHS)), **extra
    )


def _micro_batches(trainer: Any, request: Request, rank: int) -> list[dict[str, Tensor]]:
    """This rank's share of the batch, split into its micro-batches."""
    generator = torch.Generator().manual_seed(11)
    rows = len(LENGTHS)
    ids = torch.randint(3, 15, (rows, PROMPT + LONGEST), generator=generator)
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS).unsqueeze(1)
    attention = torch.cat([torch.ones(rows, PROMPT, dtype=torch.bool), mask], dim=1)
    with torch.no_grad():
        model = trainer.model.eval()
        logp = trainer._get_per_token_logps_and_entropies(model, ids, attention.long(), LONGEST)[0]
        model.train()

    def moved(by: float) -> Tensor:
        return (logp + by * torch.randn(logp.shape, generator=generator)) * mask

    batch = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:].masked_fill(~mask, 0),
        "completion_mask": mask.long(),
        "advantages": torch.zeros(rows),
        "old_per_token_logps": moved(0.1),
        "ref_per_token_logps": moved(0.3),
        "sampling_per_token_logps": moved(0.2),
    }
    if not request.sampler:
        del batch["sampling_per_token_logps"]
    share = rows // request.ranks
    for empty in request.empty:
        batch["completion_mask"][empty * share : (empty + 1) * share] = 0
    tokens = batch["completion_mask"].sum()
    batch = {key: value[rank * share : (rank + 1) * share] for key, value in batch.items()}
    size = share // request.micro_batches
    return [
        {key: value[start : start + size] for key, value in batch.items()} | {"num_items_in_batch": tokens}
        for start in range(0, share, size)
    ]


def _break(batch: dict[str, Tensor], fault: Fault | None) -> None:
    keys = {"reference": "ref_per_token_logps", "old": "old_per_token_logps", "sampler": "sampling_per_token_logps"}
    if fault is not None and fault.whose in keys:
        key = keys[fault.whose]
        batch[key] = batch[key].clone()
        batch[key][0, POSITION] = fault.value


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Sets the coefficient of each step, and keeps weights, gradient and garbage of the last one."""

    def __init__(self, trainer: Any, betas: tuple[float, ...], garbage: bool) -> None:
        self.trainer, self.betas, self.watches_garbage = trainer, betas, garbage
        self.garbage: tuple[str, ...] | None = None
        self.gradient: Tensor | None = None
        self.before: Tensor | None = None

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().float().clone() for p in self.trainer.model.parameters()])

    def changed(self) -> bool:
        return self.before is not None and not torch.equal(self.before, self.weights())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.beta = self.betas[state.global_step]
        self.before = self.weights()
        if self.watches_garbage and state.global_step == len(self.betas) - 1:
            garbage.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watches_garbage and state.global_step == len(self.betas):
            self.garbage = tuple(garbage.watched())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradient = trainers.gradient(self.trainer).float().clone()
