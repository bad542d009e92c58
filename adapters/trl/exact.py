"""KL of the states from what TRL's models hold: hidden states and output heads, never the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import disagreement
from kl_plugins.exact import ExactKL, TopKKL, linear_kl
from kl_plugins.probe import Cells

if TYPE_CHECKING:
    from kl_plugins.adapters.trl.batch import Scored
    from kl_plugins.adapters.trl.top_k import Kept

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names that model configs give to a factor on the logits."""


class StateKL(Protocol):
    """Computes the KL of the states that a trainer scores; see ``patches/trl/exact.py``.

    Without ``top:`` it is the KL over the whole vocabulary, and the reference runs beside the policy. With it, the
    reference's most probable tokens are recorded where TRL scores the reference, and used where it scores the policy.
    """

    @property
    def model(self) -> str:
        """The policy's class, for messages."""

    def recording(self, model: Any, positions: int) -> AbstractContextManager[list[Tensor]]:
        """Within the block, every forward pass of the reference appends its packed numbers of ``positions`` states.

        If ``model`` is the policy, nothing is appended.
        """

    def watching(
        self, positions: int, differentiable: bool, kept: Kept | None = None
    ) -> AbstractContextManager[list[StepKL]]:
        """Within the block, every forward pass of the policy appends the KL of its last ``positions`` states.

        With ``kept``, it is the KL over the kept tokens and one bucket, and the reference does not run.
        """

    def joined(self, results: list[StepKL], logp: Tensor, mask: Tensor, kept: Kept | None = None) -> States:
        """Join the batches of one host call, and compare their log-probs with the host's."""

    def of_rollout(
        self, call: Scored, score_policy: Callable[[Scored], Tensor], kept: Kept | None = None
    ) -> tuple[States, Tensor]:
        """Compute the same for a rollout, without graph, and the policy's log-probs of its tokens."""


class ProbedKL(NamedTuple):
    """The fields of :class:`~kl_plugins.exact.TopKKL`, and those of :class:`~kl_plugins.probe.Cells`, for a probe."""

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor
    remainder: Tensor
    of_kl: Tensor
    both: Tensor
    of_label: Tensor


StepKL = ExactKL | TopKKL | ProbedKL
"""Result of one forward pass of the policy, (b, T) each."""


def cells_in(results: list[StepKL]) -> Cells | None:
    """Join what forward passes gave for a probe.

    Args:
        results: of each forward pass, in order.

    Returns:
        (B, T) each; None without a probe.
    """
    parts = [Cells(one.of_kl, one.both, one.of_label) for one in results if isinstance(one, ProbedKL)]
    return Cells(*(torch.cat(part) for part in zip(*parts, strict=True))) if parts else None


class Deviation(NamedTuple):
    """How far log-probs computed for exact terms are from the host's on average, nats; 0 where rounding explains it.

    Attributes:
        head: of the policy's, computed with its output head.
        kept: of the reference's, read from the tokens that ``top:`` keeps.
    """

    head: float = 0.0
    kept: float = 0.0


AGREED = Deviation()
"""Every log-prob agrees with the host's."""


class States(NamedTuple):
    """KL of the states of one host call.

    Attributes:
        kl: (B, T) nats; over the whole vocabulary, or with ``top:`` over the kept tokens and one bucket.
        remainder: (B, T) contribution of the sampled tokens that ``top:`` leaves out, nats; None without ``top:``.
        deviation: of the log-probs that were computed along.
    """

    kl: Tensor
    remainder: Tensor | None
    deviation: Deviation


class OutputHead(NamedTuple):
    """How a model turns hidden states into logits.

    Attributes:
        weight: (V, D).
        bias: (V,) or None; the factor on the logits is in it.
        scale: factor on the logits, before the soft cap.
        softcap: c of c * tanh(logits / c), or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def copied(self) -> OutputHead:
        """Return the same head with its own memory."""
        return self._replace(weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())


def head_of(model: Any) -> OutputHead:
    """Return the output head of a transformers causal language model.

    Args:
        model: the model without its wrappers, inside its forward pass, where a sharded head is whole.

    Raises:
        TypeError: the head is not a linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise TypeError(
            f"kl-plugins: the output head of {type(model).__name__} is a {type(layer).__name__}; exact terms are "
            "computed from a plain linear head. Use a sampled spec, such as k2@loss/is:token"
        )
    weight, bias = (_whole(parameter) for parameter in (layer.weight, layer.bias))
    assert weight is not None
    config = model.config.get_text_config()
    softcap, scale = getattr(config, "final_logit_softcapping", None), _logit_scale(config)
    if bias is not None and scale != 1.0:
        bias = bias * scale
    return OutputHead(weight, bias, scale, None if softcap is None else float(softcap))


def _whole(parameter: Tensor | None) -> Tensor | None:
    # FSDP2 shows a sharded parameter as a DTensor.
    gather: Callable[[], Tensor] | None = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def _logit_scale(config: Any) -> float:
    for name in SCALES:
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    factor = getattr(config, "logits_scaling", None)
    if factor is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return float(factor) if config.model_type == "hyperclovax" else 1.0 / float(factor)


def kl_of_states(
    hidden: Tensor,
    head: OutputHead,
    ref_hidden: Tensor,
    ref_head: OutputHead,
    input_ids: Tensor,
    attended: Tensor,
    temperature: float,
) -> ExactKL:
    """Compute KL(policy || reference) in the state before each of the last T tokens.

    Args:
        hidden: (B, L, D) last hidden states of the policy, with their graph.
        head: the policy's head.
        ref_hidden: (B, L, D') last hidden states of the reference.
        ref_head: the reference's head.
        input_ids: (B, L) int64.
        attended: (B, T) bool; elsewhere the result is 0 without a gradient.
        temperature: divides the logits of policy and reference.

    Returns:
        (B, T) each, nats, float32.
    """
    positions = attended.shape[1]
    return linear_kl(
        scaled(states_before(hidden, positions), head),
        head.weight,
        scaled(states_before(ref_hidden, positions), ref_head),
        ref_head.weight,
        input_ids[:, -positions:],
        bias=head.bias,
        ref_bias=ref_head.bias,
        temperature=temperature,
        softcap=head.softcap,
        ref_softcap=ref_head.softcap,
        mask=attended,
        differentiable_logp=False,  # the policy loss has TRL's own; with a frozen head the backward pass is then free
    )


def states_before(hidden: Tensor, positions: int) -> Tensor:
    """Return the hidden states (B, T, D) before each of the last T tokens.

    Args:
        hidden: (B, L, D) of all tokens.
        positions: T.
    """
    return hidden[:, -positions - 1 : -1]


def scaled(hidden: Tensor, head: OutputHead) -> Tensor:
    """Multiply hidden states by the head's factor on the logits, in the dtype of the head.

    Args:
        hidden: (..., D).
        head: the head that they go into.
    """
    hidden = hidden.to(head.weight.dtype)  # cast_lm_head_to_fp32
    return hidden if head.scale == 1.0 else hidden * head.scale


def in_16_bits(hidden: Tensor) -> bool:
    """Whether TRL multiplies these hidden states by the head in 16 bits."""
    return hidden.element_size() < 4 or torch.is_autocast_enabled(hidden.device.type)


def deviation_of(ours: Tensor, host: Tensor, mask: Tensor, rounded: bool) -> float:
    """Return how far our log-probs are from TRL's own on average, nats; 0 where rounding explains it.

    Args:
        ours: (B, T) nats.
        host: (B, T) TRL's own log-probs of the same tokens, nats.
        mask: (B, T) bool.
        rounded: TRL computed them in 16 bits.
    """
    return disagreement(ours, host, mask, rounded) or 0.0


def require_agreement(deviation: Deviation, model: str) -> None:
    """Raise unless the log-probs that were computed for exact terms are those that TRL computed itself.

    A model may do more than its head shows. And what ``top:`` keeps of the reference may belong to other tokens.

    Args:
        deviation: what :func:`deviation_of` gave, on any rank.
        model: the policy's class, for the message.

    Raises:
        RuntimeError: they differ.
    """
    # First, because numbers of other tokens can spoil the log-probs of the policy as well.
    if deviation.kept != 0:
        raise RuntimeError(
            f"kl-plugins: log-probs of the reference's most probable tokens differ from TRL's own by "
            f"{deviation.kept:.2g} nats on average. Either they belong to other tokens, because something reordered "
            "TRL's batch in part, or the reference's logits are more than its output head shows. Use a sampled spec, "
            "such as k2@loss/is:token"
        )
    if deviation.head != 0:
        raise RuntimeError(
            f"kl-plugins: log-probs from the output head of {model} differ from TRL's own by {deviation.head:.2g} "
            "nats on average, so its logits are more than its head shows and an exact KL would be wrong. Use a sampled "
            "spec, such as k2@loss/is:token"
        )
