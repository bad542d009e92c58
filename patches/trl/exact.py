"""Where exact terms read TRL's models: inside the policy's own forward pass, between its backbone and its head.

There a sharded head is whole (FSDP), and neither side's logits are ever made here. The reference runs on the arguments
that the policy's backbone was called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.trl.batch import Scored
from kl_plugins.adapters.trl.exact import deviation_of, head_of, in_16_bits, kl_of_states
from kl_plugins.exact import ExactKL


class TrainerStates:
    """A :class:`~kl_plugins.adapters.trl.exact.StateKL` for one trainer."""

    def __init__(self, trainer: Any, no_checkpointing: Callable[..., AbstractContextManager[None]]) -> None:
        """Find policy and reference.

        Args:
            trainer: the trainer, built.
            no_checkpointing: TRL's context manager that switches gradient checkpointing off.
        """
        self._trainer = trainer
        self._no_checkpointing = no_checkpointing
        self._rounded = False

    @property
    def model(self) -> str:
        """The policy's class, for messages."""
        return type(self._bare(self._trainer.model)).__name__

    @contextmanager
    def watching(self, positions: int, differentiable: bool) -> Iterator[list[ExactKL]]:
        """Within the block, every forward pass of the policy appends the KL of its last ``positions`` states.

        Args:
            positions: T, the length of the completions.
            differentiable: keep the graph of the KL.
        """
        results: list[ExactKL] = []
        policy = self._bare(self._trainer.model)

        def after_backbone(backbone: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            grad = torch.enable_grad() if differentiable and torch.is_grad_enabled() else torch.no_grad()
            with grad:
                results.append(self._kl(policy, output.last_hidden_state, args, kwargs, positions))

        with _hook(policy.base_model, after_backbone):
            yield results

    def of_rollout(self, call: Scored, score_policy: Callable[[Scored], Tensor]) -> tuple[Tensor, float, Tensor]:
        """(B, T) KL of a rollout's states, without graph: one forward pass of the policy and one of the reference.

        The head's deviation and the policy's log-probs of the rollout's tokens come with it.

        Args:
            call: the host's call that scored the rollout.
            score_policy: scores the same tokens under the policy.
        """
        with self.watching(call.response_mask().shape[1], differentiable=False) as results:
            logp = score_policy(call)
        return *self.joined(results, logp, call.response_mask()), logp

    def joined(self, results: list[ExactKL], logp: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """(B, T) KL of the batches of one call, and how far the head's log-probs are from the host's; 0: they agree.

        Raises:
            RuntimeError: the policy's forward pass was not seen.
        """
        if not results:
            raise RuntimeError(
                f"kl-plugins: the backbone of {self.model} was not called where TRL scored the policy, so no exact KL "
                "could be computed; use a sampled spec, such as k2@loss/is:token"
            )
        merged = ExactKL(*(torch.cat(parts) for parts in zip(*results, strict=True)))
        return merged.kl, deviation_of(merged, logp, mask, self._rounded)

    def _kl(self, policy: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any], positions: int) -> ExactKL:
        self._rounded = in_16_bits(hidden)
        found: list[ExactKL] = []
        grad = torch.is_grad_enabled()
        reference, as_reference = self._reference()

        def after_reference_backbone(backbone: Any, ref_args: Any, ref_kwargs: Any, output: Any) -> None:
            ref_hidden, bare = output.last_hidden_state, self._bare(reference)
            attended = kwargs["attention_mask"][:, -positions:].bool()
            sides = hidden, head_of(policy), ref_hidden, head_of(bare)
            with torch.set_grad_enabled(grad):
                found.append(kl_of_states(*sides, kwargs["input_ids"], attended, self._trainer.temperature))

        # The same backbone serves as reference under PEFT: this hook then runs inside the one that called us.
        with torch.no_grad(), as_reference, _hook(self._bare(reference).base_model, after_reference_backbone):
            reference(*args, **kwargs, **_one_position(self._bare(reference)))
        return found[0]

    def _reference(self) -> tuple[Any, AbstractContextManager[Any]]:
        trainer = self._trainer
        if trainer.ref_model is not None:
            return trainer.ref_model, nullcontext()
        from trl.trainer.utils import use_adapter

        model = trainer.accelerator.unwrap_model(trainer.model)
        return model, self._as_reference(use_adapter(model, "ref" if "ref" in model.peft_config else None))

    @contextmanager
    def _as_reference(self, adapter: AbstractContextManager[Any]) -> Iterator[None]:
        trainer = self._trainer
        with self._no_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs), adapter:
            yield

    def _bare(self, model: Any) -> Any:
        model = self._trainer.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


@contextmanager
def _hook(module: Any, function: Callable[..., None]) -> Iterator[None]:
    # Not re-entrant: under PEFT the reference's pass goes through the policy's hook as well.
    running = False

    def once(*arguments: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        try:
            function(*arguments)
        finally:
            running = False

    handle = module.register_forward_hook(once, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _one_position(model: Any) -> dict[str, int]:
    """Keeps the reference's own head from making logits that nobody reads."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
