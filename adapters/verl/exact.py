"""KL of the states from the logits that veRL's engine shows its loss function, packed token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import disagreement
from kl_plugins.adapters.top_k import label_log_probs, unpacked
from kl_plugins.adapters.verl.batch import MASK, REFERENCE, Rows, padded, response_rows
from kl_plugins.adapters.verl.shared_sequences import held_here
from kl_plugins.adapters.verl.top_k import carried
from kl_plugins.exact import exact_kl
from kl_plugins.probe import Cells, cells_of
from kl_plugins.reference import RefTopK
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import numbers_per_token
from kl_plugins.top_k import log_odds, top_k_kl

EXACT, REMAINDER = "kl_plugins_exact", "kl_plugins_remainder"
"""Keys in the engine's model output: the KL of each state, and under ``top:`` what its sampled token adds."""

CELLS = tuple(f"kl_plugins_cells_{name}" for name in Cells._fields)
"""Keys of what a probe of an observed spec with ``top:`` needs, in the order of :class:`~kl_plugins.probe.Cells`."""


def cost(spec: KLSpec) -> str:
    """Say what exact terms add to veRL's own work; empty for sampled specs."""
    if not spec.needs_exact:
        return ""
    if spec.top is not None:
        return f"{numbers_per_token(spec.top, spec.draws)} numbers per token from the reference's pass"
    return "a forward pass of the reference with its logits (tokens x vocabulary) per micro-batch"


def packed_kl(
    spec: KLSpec, logits: Tensor, reference: Callable[[], Tensor], data: Any, overwritten: bool
) -> dict[str, Tensor]:
    """Compute KL(policy || reference) in the state of each packed position that predicts a response token; else 0.

    Args:
        spec: a spec with exact terms over the whole vocabulary.
        logits: (1, N, V) of the policy, scaled by the temperature, with their graph; where ranks share sequences, of
            this rank's part of the packed positions.
        reference: gives the logits of the reference, of the same positions.
        data: veRL's micro-batch.
        overwritten: veRL's own backward pass writes into the memory of ``logits``.

    Returns:
        (1, N) nats, float32, by key.
    """
    rows = response_rows(data)
    labels = held_here(_labels(data, rows.position), -100).unsqueeze(0)
    with _with_gradient(spec):
        found = exact_kl(_kept_apart(logits, overwritten), reference(), labels)
    return {EXACT: found.kl}


class Pending(NamedTuple):
    """What a KL over the reference's top-k tokens needs until the policy's log-probs are there, for n response tokens.

    Attributes:
        rows: where the tokens are.
        labels: (n,) the tokens.
        kept: the reference's numbers, (n, k) and (n,).
        ref_logp: (n,) the host's own log-probs of the tokens under the reference, nats.
        odds: (n, k + m) of these tokens and the draws, see :func:`kl_plugins.top_k.log_odds`, of the policy, nats, with
            their graph.
    """

    rows: Rows
    labels: Tensor
    kept: RefTopK
    ref_logp: Tensor
    odds: Tensor

    def with_log_probs(self, spec: KLSpec, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the KL over the kept tokens and one bucket, and the remainder.

        Args:
            spec: the spec with ``top:``.
            log_probs: (B, T) veRL's log-probs of the response tokens under the policy, nats, with their graph.

        Returns:
            (B, T) each, nats, float32; 0 where there is no response token.
        """
        place = self.rows.sequence, self.rows.step
        with _with_gradient(spec):
            own = log_probs[place]
            sides = self.odds + own[:, None], own, self.labels
            found = top_k_kl(*sides, reference=self.kept, ref_logp=self.ref_logp)
            nothing = torch.zeros_like(log_probs, dtype=found.kl.dtype)
            return nothing.index_put(place, found.kl), nothing.index_put(place, found.remainder)

    @torch.no_grad()
    def cells(self, log_probs: Tensor) -> Cells:
        """Compute what a probe needs, (B, T) each; the argument is that of :meth:`with_log_probs`."""
        place = self.rows.sequence, self.rows.step
        found = cells_of(self.odds + log_probs[place][:, None], self.labels, self.kept)
        nothing = torch.zeros_like(log_probs, dtype=found.kl.dtype)
        return Cells(*(nothing.index_put(place, part) for part in found))


def packed_top_k(
    spec: KLSpec, logits: Tensor, data: Any, overwritten: bool, log_probs_in_32_bits: bool, probed: bool = False
) -> tuple[dict[str, Tensor], Pending | None, float]:
    """Compute the KL over the reference's top-k tokens and one bucket, and the remainder, or what is needed for that.

    The numbers of the reference are those that the micro-batch carries.

    Args:
        spec, logits, data, overwritten: as in :func:`packed_kl`.
        log_probs_in_32_bits: veRL is going to compute log-probs of these logits in float32.
        probed: give what a probe needs as well; without graph.

    Returns:
        (1, N) nats, float32, by key, or nothing if the host's log-probs will serve; what they then serve; and by how
        much the log-probs of the response tokens differ between the numbers and the host's own, in nats: 0 where
        rounding explains it, infinity if there are too few numbers or too many. A rank that raised here would leave
        the others waiting.
    """
    rows = response_rows(data)
    labels = _labels(data, rows.position)
    size = numbers_per_token(min(int(spec.top or 0), logits.shape[-1]), spec.draws)
    numbers = carried(data, size, len(rows.position))
    if numbers is None:
        nothing = logits[..., 0].float() * 0
        keys = (REMAINDER, *CELLS) if probed else (REMAINDER,)
        return {EXACT: nothing, **dict.fromkeys(keys, nothing.detach())}, None, math.inf
    host = padded(data, REFERENCE)[rows.sequence, rows.step].float()
    kept = unpacked(numbers, draws=spec.draws)  # of the temperature by which both models' logits are divided
    mask, drawn = padded(data, MASK)[rows.sequence, rows.step], labels[rows.position]
    difference = disagreement(label_log_probs(kept, drawn, host), host, mask, _rounded(logits, host)) or 0.0
    spread = numbers.new_zeros(len(labels), numbers.shape[-1])
    spread[rows.position] = numbers
    everywhere = unpacked(spread, draws=spec.draws)
    with _with_gradient(spec):
        if log_probs_in_32_bits:
            odds = log_odds(logits.squeeze(0), labels, everywhere.tokens, share_grad=True)[rows.position]
            return {}, Pending(rows, drawn, kept, host, odds), difference
        ref_logp = host.new_zeros(len(labels))
        ref_logp[rows.position] = host
        tokens, reference = held_here(labels, -100), unpacked(held_here(spread, 0), draws=spec.draws)
        apart = _kept_apart(logits, overwritten).squeeze(0)
        found = exact_kl(apart, None, tokens, reference=reference, ref_logp=held_here(ref_logp, 0))
    results = {EXACT: found.kl[None], REMAINDER: found.remainder[None]}
    if probed:
        log_probs = log_odds(logits.squeeze(0), tokens, reference.tokens) + found.logp[:, None]
        results |= {key: part[None] for key, part in zip(CELLS, cells_of(log_probs, tokens, reference), strict=True)}
    return results, None, difference


def _labels(data: Any, position: Tensor) -> Tensor:
    """Return (N,) the next token of each packed position that predicts a response token, else -100."""
    tokens: Tensor = data["input_ids"].values()
    labels = torch.full_like(tokens, -100)
    labels[position] = tokens[position + 1]
    return labels


def _rounded(logits: Tensor, host: Tensor) -> bool:
    """Whether the host may have computed log-probs in 16 bits; the reference's settings need not be the policy's."""
    halves = (torch.bfloat16, torch.float16)
    return logits.dtype in halves or any(torch.equal(host, host.to(half).float()) for half in halves)


def _with_gradient(spec: KLSpec) -> torch.set_grad_enabled:
    # As returns of a sampled spec, exact terms are numbers.
    return torch.set_grad_enabled(torch.is_grad_enabled() and spec.estimator == "exact")


def _kept_apart(logits: Tensor, overwritten: bool) -> Tensor:
    return logits.clone() if overwritten and torch.is_grad_enabled() else logits
