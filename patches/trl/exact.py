"""Where exact terms read TRL's models: inside a model's own forward pass, between its backbone and its head.

There a sharded head is whole (FSDP), and the logits of neither side are ever made here. With ``top:``, what is needed
of the reference is recorded in the pass in which TRL scores it. Without ``top:``, the reference runs inside the
policy's pass, on the arguments that the policy's backbone was called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.top_k import generator_of, packed
from kl_plugins.adapters.trl.batch import Scored
from kl_plugins.adapters.trl.exact import (
    Deviation,
    States,
    StepKL,
    deviation_of,
    head_of,
    in_16_bits,
    kl_of_states,
)
from kl_plugins.adapters.trl.top_k import Kept, ScoredRows, top_k_of_states
from kl_plugins.exact import ExactKL
from kl_plugins.patches.trl import fused_head
from kl_plugins.spec import KLSpec
from kl_plugins.top_k import reference_of


class TrainerStates:
    """A :class:`~kl_plugins.adapters.trl.exact.StateKL` for one trainer."""

    def __init__(
        self, trainer: Any, no_checkpointing: Callable[..., AbstractContextManager[None]], spec: KLSpec
    ) -> None:
        """Find policy and reference.

        Args:
            trainer: the trainer, built.
            no_checkpointing: TRL's context manager that switches gradient checkpointing off.
            spec: the run's spec; its ``top:`` says how many of the reference's tokens are recorded.
        """
        self._trainer = trainer
        self._no_checkpointing = no_checkpointing
        self._top, self._draws = spec.top, spec.draws
        self._rounded = self._ref_rounded = False
        self._fused = spec.top is not None and fused_head.is_known()

    @property
    def model(self) -> str:
        """The policy's class, for messages."""
        return type(self._bare(self._trainer.model)).__name__

    @contextmanager
    def recording(self, model: Any, positions: int) -> Iterator[list[Tensor]]:
        """Within the block, every forward pass of the reference appends its packed numbers of ``positions`` states.

        Args:
            model: what TRL scores. If it is the policy, or if nothing is to be recorded, nothing is appended.
            positions: T, the length of the completions.
        """
        results: list[Tensor] = []
        top = self._top
        if top is None or not self._is_reference(model):
            yield results
            return
        reference = self._bare(model)

        temperature, scored = self._trainer.temperature, list[ScoredRows]()

        def after_backbone(backbone: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden = output.last_hidden_state
            self._ref_rounded = in_16_bits(hidden)
            attended = kwargs["attention_mask"][:, -positions:].bool()
            states = ScoredRows(kwargs["input_ids"], attended)
            if self._fused:
                scored.append(states)
            else:
                given = hidden, head_of(reference), states, top, temperature, self._draws
                results.append(top_k_of_states(*given))

        def wanted(rows: int) -> fused_head.MostProbable:
            sought = scored[-1].to_rows(scored[-1].attended, rows)
            generator = generator_of(scored[-1].labels) if self._draws else None
            return fused_head.MostProbable(top, sought, self._draws or 0, generator)

        def from_head(found: fused_head.Found) -> None:
            best, size = found.ids[:, : found.ids.shape[1] - (self._draws or 0)], head_of(reference).weight.shape[0]
            kept = reference_of(best, found.log_probs, size, temperature=temperature, draws=found.draws)
            states = scored.pop()
            results.append(states.from_rows(packed(kept)).masked_fill(~states.attended[..., None], 0.0))

        with _hook(reference.base_model, after_backbone), self._head_watched(wanted, from_head):
            yield results

    @contextmanager
    def watching(self, positions: int, differentiable: bool, kept: Kept | None = None) -> Iterator[list[StepKL]]:
        """Within the block, every forward pass of the policy appends the KL of its last ``positions`` states.

        Args:
            positions: T, the length of the completions.
            differentiable: keep the graph of the KL.
            kept: what was recorded of the reference at all rows together; None: the reference runs as well.
        """
        results: list[StepKL] = []
        policy, temperature, scored = self._bare(self._trainer.model), self._trainer.temperature, list[ScoredRows]()

        def after_backbone(backbone: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden = output.last_hidden_state
            attended = kwargs["attention_mask"][:, -positions:].bool()
            self._rounded = in_16_bits(hidden)
            if kept is not None and self._fused:
                scored.append(ScoredRows(kwargs["input_ids"], attended))
                return
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                if kept is None:
                    results.append(self._kl(policy, hidden, args, kwargs, positions))
                    return
                sides = hidden, head_of(policy), kwargs["input_ids"], attended
                results.append(kept.kl_of_states(_rows_in(results), *sides, temperature))

        def wanted(rows: int) -> Tensor:
            assert kept is not None
            return scored[-1].to_rows(kept.tokens(_rows_in(results), scored[-1]), rows)

        def from_head(found: fused_head.Found) -> None:
            assert kept is not None
            states = scored.pop()
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                sides = states.from_rows(found.log_probs), states.from_rows(found.logp), states
                results.append(kept.kl_of_log_probs(_rows_in(results), *sides, temperature))

        with _hook(policy.base_model, after_backbone), self._head_watched(wanted if kept else None, from_head):
            yield results

    def _head_watched(
        self, wanted: Callable[[int], fused_head.Wanted] | None, found: Callable[[fused_head.Found], None]
    ) -> AbstractContextManager[None]:
        return fused_head.watched(wanted, found) if wanted is not None and self._fused else nullcontext()

    def of_rollout(
        self, call: Scored, score_policy: Callable[[Scored], Tensor], kept: Kept | None = None
    ) -> tuple[States, Tensor]:
        """KL of a rollout's states, without graph, and the policy's log-probs of its tokens.

        It takes one forward pass of the policy, and without ``kept`` one of the reference.

        Args:
            call: the host's call that scored the rollout.
            score_policy: scores the same tokens under the policy.
            kept: what was recorded of the reference.
        """
        with self.watching(call.response_mask().shape[1], differentiable=False, kept=kept) as results:
            logp = score_policy(call)
        return self.joined(results, logp, call.response_mask(), kept), logp

    def joined(self, results: list[StepKL], logp: Tensor, mask: Tensor, kept: Kept | None = None) -> States:
        """Join the batches of one call, and compare their log-probs with the host's.

        Args:
            results: what :meth:`watching` gave.
            logp: (B, T) the host's log-probs under the policy, nats.
            mask: (B, T) bool.
            kept: what :meth:`watching` was given.

        Raises:
            RuntimeError: the policy's forward pass was not seen.
        """
        if not results:
            raise RuntimeError(
                f"kl-plugins: the backbone of {self.model} was not called where TRL scored the policy, so no exact KL "
                "could be computed; use a sampled spec, such as k2@loss/is:token"
            )
        merged = type(results[0])(*(torch.cat(parts) for parts in zip(*results, strict=True)))
        head = deviation_of(merged.logp, logp, mask, self._rounded)
        if kept is None or isinstance(merged, ExactKL):
            return States(merged.kl, None, Deviation(head))
        of_kept = deviation_of(merged.ref_logp, kept.ref_logp, mask, self._ref_rounded)
        return States(merged.kl, merged.remainder, Deviation(head, of_kept))

    def _kl(self, policy: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any], positions: int) -> ExactKL:
        found: list[ExactKL] = []
        grad = torch.is_grad_enabled()
        reference, as_reference = self._reference()

        def after_reference_backbone(backbone: Any, ref_args: Any, ref_kwargs: Any, output: Any) -> None:
            ref_hidden, bare = output.last_hidden_state, self._bare(reference)
            attended = kwargs["attention_mask"][:, -positions:].bool()
            head, ref_head = head_of(policy), head_of(bare)
            if grad and head.weight.requires_grad and hasattr(bare, "reshard"):
                # FSDP2 frees the whole parameters after the reference's pass, and the backward pass reads them.
                ref_head = ref_head.copied()
            sides = hidden, head, ref_hidden, ref_head
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

    def _is_reference(self, model: Any) -> bool:
        trainer = self._trainer
        if trainer.ref_model is not None:
            return model is trainer.ref_model
        # One model is both: TRL has switched to the reference's adapter, or all adapters off.
        from peft.tuners.tuners_utils import BaseTunerLayer

        peft_model = trainer.accelerator.unwrap_model(model)
        if "ref" in peft_model.peft_config:
            return bool(peft_model.active_adapter == "ref")
        return any(isinstance(layer, BaseTunerLayer) and layer.disable_adapters for layer in peft_model.modules())

    @contextmanager
    def _as_reference(self, adapter: AbstractContextManager[Any]) -> Iterator[None]:
        trainer = self._trainer
        with self._no_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs), adapter:
            yield

    def _bare(self, model: Any) -> Any:
        model = self._trainer.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _rows_in(results: list[StepKL]) -> int:
    """Return the number of rows that have gone through the model; TRL passes its rows in order, batch by batch."""
    return sum(len(result.kl) for result in results)


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
