"""Exact KL of the states of a training step of OpenRLHF: from its logits, and the reference's logits or top-k numbers.

OpenRLHF can pack the sequences of a micro-batch one after the other. Its logits then are (1, N, V) for the N tokens of
all sequences, while everything else stays (B, A). Under ring attention each rank has a part of the N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import MEAN_DEVIATION, MEAN_DEVIATION_16_BIT
from kl_plugins.adapters.openrlhf.shared_sequences import held
from kl_plugins.adapters.top_k import label_log_probs, unpacked
from kl_plugins.exact import exact_kl
from kl_plugins.probe import Cells, cells_of
from kl_plugins.top_k import log_odds, top_k_kl

if TYPE_CHECKING:
    from kl_plugins.adapters.openrlhf.batch import MicroBatch


def states_kl(
    batch: MicroBatch, logp: Tensor, logits: Tensor, experience: Any, reference: Callable[[], Tensor] | None
) -> Tensor:
    """Compute KL(policy || reference) in the states that the response tokens were drawn in, and give it to the batch.

    Args:
        batch: a micro-batch of a spec with exact terms; gets its ``exact``, under ``top:`` its ``remainder``, and in a
            probe its ``cells``.
        logp: (B, A) OpenRLHF's log-probs of the response tokens, computed from the logits, nats, with their graph.
        logits: (B, L, V) of the policy, scaled by the temperature, with their graph; (1, N, V) if they are packed; of
            the part that :func:`~kl_plugins.adapters.openrlhf.shared_sequences.held` describes.
        experience: OpenRLHF's micro-batch; its ``sequences`` are (B, L).
        reference: gives the same logits of the reference; None under ``top:``.

    Returns:
        0-d float32, nats: the sum over response tokens of |difference| between the reference's log-probs here and those
        of OpenRLHF's reference actor; infinite if the numbers of ``top:`` do not fit the response tokens.
    """
    spec, mask, shape = batch.session.spec, batch.mask, logits.shape[:-1]
    here = held(mask, experience.attention_mask, shape)
    rows = here.rows
    tokens = experience.sequences[:, -mask.shape[1] :][mask][here.tokens]
    host_ref_logp = experience.base_action_log_probs[mask][here.tokens].float()

    def by_row(values: Tensor, elsewhere: int) -> Tensor:
        # Whole rows, most of them left out. A selection of the logits would be a copy.
        found = values.new_full((len(rows), *values.shape[1:]), elsewhere)
        found[rows] = values
        return found.view(*shape, *values.shape[1:])

    def by_token(values: Tensor) -> Tensor:
        found = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
        return found.masked_scatter(mask, here.of_all(values))

    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.estimator == "exact"):
        if reference is not None:
            whole = exact_kl(logits, reference(), by_row(tokens, -100))
            batch.exact, ref_logp = by_token(whole.kl.flatten()[rows]), whole.ref_logp.flatten()[rows]
        else:
            assert batch.numbers is not None
            kept, own = unpacked(batch.numbers[here.tokens], draws=spec.draws), logp[mask][here.tokens]
            odds = log_odds(logits, by_row(tokens, 0), by_row(kept.tokens, 0), share_grad=True).flatten(0, -2)[rows]
            found = top_k_kl(odds + own[:, None], own, tokens, reference=kept, ref_logp=host_ref_logp)
            batch.exact, batch.remainder = by_token(found.kl), by_token(found.remainder)
            if batch.session.probing:
                batch.cells = Cells(*map(by_token, cells_of(odds + own[:, None], tokens, kept)))
            ref_logp = label_log_probs(kept, tokens, host_ref_logp)
    difference = here.of_all((ref_logp.detach().float() - host_ref_logp).abs()).sum()
    return difference if batch.fits else torch.full_like(difference, torch.inf)


@torch.no_grad()
def measure_states(batch: MicroBatch, logp: Tensor, logits: Tensor, experience: Any) -> None:
    """Give a micro-batch the KL that an observed spec with ``top:`` needs; nothing is read back from the device.

    If the reference's numbers belong to other tokens, the KL becomes NaN. Then no token of the micro-batch is measured.

    Args:
        batch, logp, logits, experience: as in :func:`states_kl`.
    """
    difference = states_kl(batch, logp, logits, experience, None)
    assert batch.exact is not None
    belongs = difference <= MEAN_DEVIATION * batch.mask.sum()
    batch.exact = torch.where(belongs, batch.exact, torch.nan)


def require_same_reference(deviation: float, rounded: bool, top: int | None) -> None:
    """Raise unless the reference of the exact terms is OpenRLHF's own; all ranks call it with the same number.

    Args:
        deviation: mean |difference| of the log-probs, over the response tokens of all ranks, nats.
        rounded: the models compute in 16 bits. Log-probs and numbers of ``top:`` come from one forward pass, whose
            logits are float32, so rounding explains no difference between them.
        top: of the spec.

    Raises:
        RuntimeError: rounding does not explain it.
    """
    if deviation <= (MEAN_DEVIATION_16_BIT if rounded and top is None else MEAN_DEVIATION):
        return
    if top is not None:
        raise RuntimeError(
            "kl-plugins: the reference's most probable tokens do not fit the log-probs of OpenRLHF's reference actor "
            f"(they differ by {deviation:.2g} nats on average), so they belong to other response tokens or to another "
            "model; this experience maker or replay buffer is not known"
        )
    raise RuntimeError(
        "kl-plugins: the reference model in this worker gives log-probs that differ from those of OpenRLHF's "
        f"reference actor by {deviation:.2g} nats on average, so an exact KL would be to another model. Use "
        "top: in the spec, which needs no reference model here, or a sampled spec, such as k2@loss/is:token"
    )
