"""Full-vocabulary KL from what TRL's models hold: hidden states and output heads, never the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import disagreement
from kl_plugins.exact import ExactKL, linear_kl

if TYPE_CHECKING:
    from kl_plugins.adapters.trl.batch import Scored

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names that model configs give to a factor on the logits."""


class StateKL(Protocol):
    """Computes the full-vocabulary KL of the states that a trainer scores; see ``patches/trl/exact.py``."""

    @property
    def model(self) -> str:
        """The policy's class, for messages."""

    def watching(self, positions: int, differentiable: bool) -> AbstractContextManager[list[ExactKL]]:
        """Within the block, every forward pass of the policy appends the KL of its last ``positions`` states."""

    def joined(self, results: list[ExactKL], logp: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Join the batches of one host call: (B, T) KL, and how far the head's log-probs are from the host's, or 0."""

    def of_rollout(self, call: Scored, score_policy: Callable[[Scored], Tensor]) -> tuple[Tensor, float, Tensor]:
        """Compute the same for a rollout, without graph, and the policy's log-probs of its tokens."""


class OutputHead(NamedTuple):
    """How a model turns hidden states into logits.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        scale: factor on the logits, before the soft cap.
        softcap: c of c * tanh(logits / c), or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


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
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(weight, bias, _logit_scale(config), None if softcap is None else float(softcap))


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
    states = slice(-attended.shape[1] - 1, -1)
    return linear_kl(
        _scaled(hidden[:, states], head),
        head.weight,
        _scaled(ref_hidden[:, states], ref_head),
        ref_head.weight,
        input_ids[:, -attended.shape[1] :],
        bias=head.bias,
        ref_bias=ref_head.bias,
        temperature=temperature,
        softcap=head.softcap,
        ref_softcap=ref_head.softcap,
        mask=attended,
        differentiable_logp=False,  # the policy loss has TRL's own; with a frozen head the backward pass is then free
    )


def _scaled(hidden: Tensor, head: OutputHead) -> Tensor:
    if head.scale != 1.0 and head.bias is not None:
        raise TypeError("kl-plugins: a head with a bias and a logit scale is not one that exact terms know")
    hidden = hidden.to(head.weight.dtype)  # cast_lm_head_to_fp32
    return hidden if head.scale == 1.0 else hidden * head.scale


def in_16_bits(hidden: Tensor) -> bool:
    """Whether TRL multiplies these hidden states by the head in 16 bits."""
    return hidden.element_size() < 4 or torch.is_autocast_enabled(hidden.device.type)


def deviation_of(exact: ExactKL, logp: Tensor, mask: Tensor, rounded: bool) -> float:
    """Return how far the head's log-probs are from TRL's own on average, nats; 0 where rounding explains it.

    Args:
        exact: (B, T) per-token results.
        logp: (B, T) TRL's own log-probs of the same tokens, nats.
        mask: (B, T) bool.
        rounded: TRL computed them in 16 bits.
    """
    return disagreement(exact.logp, logp, mask, rounded) or 0.0


def require_head(deviation: float, model: str) -> None:
    """Raise unless the head gives the log-probs that TRL computed itself: a model may do more than its head shows.

    Args:
        deviation: what :func:`deviation_of` gave, on any rank.
        model: the policy's class, for the message.

    Raises:
        RuntimeError: they differ.
    """
    if deviation != 0:
        raise RuntimeError(
            f"kl-plugins: log-probs from the output head of {model} differ from TRL's own by {deviation:.2g} "
            "nats on average, so its logits are more than its head shows and an exact KL would be wrong. Use a sampled "
            "spec, such as k2@loss/is:token"
        )
