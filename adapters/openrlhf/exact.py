"""Full-vocabulary KL from the logits of OpenRLHF's training step and those of a reference in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import MEAN_DEVIATION, MEAN_DEVIATION_16_BIT
from kl_plugins.adapters.micro_batch import divisor_of_remainder
from kl_plugins.adapters.openrlhf.batch import MicroBatch
from kl_plugins.exact import ExactKL, exact_kl


def states_kl(batch: MicroBatch, logits: Tensor, reference: Callable[[], Tensor], experience: Any) -> ExactKL:
    """Compute KL(policy || reference) in the states that the response tokens were drawn in.

    Args:
        batch: a micro-batch of a spec with exact terms.
        logits: (B, L, V) of the policy, scaled by the temperature, with their graph.
        reference: gives the same of the reference.
        experience: OpenRLHF's micro-batch; its ``sequences`` are (B, L).

    Returns:
        (B, T) each, nats, float32.
    """
    spec, mask, sequences = batch.session.spec, batch.mask, experience.sequences
    states = slice(-mask.shape[1] - 1, -1)
    # Labels for whole rows, and most of them -100, which is left out. A slice of the logits would be a copy.
    labels = torch.full_like(sequences, -100)
    labels[:, states] = sequences[:, -mask.shape[1] :].masked_fill(~mask, -100)
    behaviour = None
    chosen = divisor_of_remainder(spec, batch.old_logp, batch.sampler_logp)
    if chosen is not None:
        behaviour = torch.zeros(sequences.shape, dtype=chosen.dtype, device=chosen.device)
        behaviour[:, states] = chosen
    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.estimator == "exact"):
        found = exact_kl(logits, reference(), labels, top=spec.top, behaviour_logp=behaviour)
    return ExactKL(*(part[:, states] for part in found))


def reference_difference(found: ExactKL, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Sum |difference| between the log-probs of the reference here and of OpenRLHF's reference actor.

    Args:
        found: per-token results.
        ref_logp: (B, T) log-probs that OpenRLHF's reference actor gave the same tokens, nats.
        mask: (B, T) response tokens.

    Returns:
        0-d, nats, float32; it stays on the device.
    """
    difference = (found.ref_logp.detach().float() - ref_logp.detach().float()).abs()
    return difference.masked_fill(~mask.bool(), 0.0).sum()


def require_same_reference(deviation: float, rounded: bool) -> None:
    """Raise unless the reference here is OpenRLHF's own; all ranks call it with the same number.

    Args:
        deviation: mean |difference| of the log-probs, over the response tokens of all ranks, nats.
        rounded: the models compute in 16 bits.

    Raises:
        RuntimeError: rounding does not explain it.
    """
    if deviation > (MEAN_DEVIATION_16_BIT if rounded else MEAN_DEVIATION):
        raise RuntimeError(
            "kl-plugins: the reference model in this worker gives log-probs that differ from those of OpenRLHF's "
            f"reference actor by {deviation:.2g} nats on average, so an exact KL would be to another model. Use "
            "a sampled spec, such as k2@loss/is:token"
        )
