"""``top:`` in TRL: the reference's most probable tokens, found while TRL scores a rollout and used in its updates.

TRL's batch carries them between the two, see :mod:`kl_plugins.adapters.top_k`. So the reference does not run in the
updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.top_k import KEY, generator_of, label_log_probs, packed, unpacked
from kl_plugins.adapters.trl.exact import OutputHead, ProbedKL, scaled, states_before
from kl_plugins.exact import TopKKL, linear_kl
from kl_plugins.kernels.exact.selected_products import selected_products
from kl_plugins.probe import cells_of
from kl_plugins.reference import RefTopK, linear_reference_top_k
from kl_plugins.top_k import log_odds, top_k_kl

GATHERED_BYTES = 2**27
"""Limit of the temporary memory in a probe, in bytes: rows of the head are gathered, and copied once."""


class ScoredRows(NamedTuple):
    """The states that one forward pass scores, and which rows of TRL's fused head they are.

    The head gets either the states of all tokens but the last, or only those before attended tokens.

    Attributes:
        input_ids: (b, L) int64.
        attended: (b, T) bool, of the last T tokens.
    """

    input_ids: Tensor
    attended: Tensor

    @property
    def labels(self) -> Tensor:
        """(N,) the attended tokens."""
        return self.input_ids[:, -self.attended.shape[1] :][self.attended]

    def to_rows(self, values: Tensor, rows: int) -> Tensor:
        """Select what belongs to the rows of the head.

        Args:
            values: (b, T, ...) of the last T tokens.
            rows: number of rows that the head was called with.

        Returns:
            (rows, ...), 0 in rows of earlier tokens.

        Raises:
            RuntimeError: the head scores other rows.
        """
        sequences, length = self.input_ids.shape
        if rows == sequences * (length - 1):
            whole = values.new_zeros(sequences, length - 1, *values.shape[2:])
            whole[:, -self.attended.shape[1] :] = values
            return whole.flatten(0, 1)
        if rows == int(self.attended.sum()):
            return values[self.attended]
        raise RuntimeError(
            f"kl-plugins: TRL's fused head scores {rows} rows of {sequences} sequences with {length} tokens each, "
            f"{int(self.attended.sum())} of them in completions; this way to score is not known. Use a sampled spec, "
            "such as k2@loss/is:token"
        )

    def from_rows(self, values: Tensor) -> Tensor:
        """Undo :meth:`to_rows`: (rows, ...) becomes (b, T, ...), 0 where not attended."""
        sequences, length = self.input_ids.shape
        if len(values) == sequences * (length - 1):
            return values.view(sequences, length - 1, *values.shape[1:])[:, -self.attended.shape[1] :]
        whole = values.new_zeros(*self.attended.shape, *values.shape[1:])
        return whole.index_put((self.attended,), values)


def top_k_of_states(
    hidden: Tensor, head: OutputHead, scored: ScoredRows, k: int, temperature: float, draws: int | None = None
) -> Tensor:
    """Find the reference's k most probable tokens in the state before each of the last T tokens.

    Args:
        hidden: (B, L, D) last hidden states of the reference.
        head: the reference's head.
        scored: the states; nothing is computed where they are not attended.
        k: number of tokens.
        temperature: divides the logits.
        draws: number m of tokens to draw; None for none.

    Returns:
        (B, T, 2 k + 1) float32, or (B, T, 2 k + 3 m + 2) with draws, as :func:`kl_plugins.adapters.top_k.packed` gives
        them; 0 where not attended.
    """
    attended, labels = scored.attended, scored.labels
    kept = linear_reference_top_k(
        scaled(states_before(hidden, attended.shape[1])[attended], head),
        head.weight,
        k,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        labels=labels,
        draws=draws or 0,
        generator=generator_of(labels) if draws else None,
    )
    numbers = packed(kept)
    found = numbers.new_zeros(*attended.shape, numbers.shape[-1])
    found[attended] = numbers
    return found


class Kept(NamedTuple):
    """What is known of the reference at the tokens of a rollout or a micro-batch.

    Attributes:
        numbers: (B, T, 2 k + 1) what :func:`top_k_of_states` gave.
        ref_logp: (B, T) TRL's own log-probs of the tokens under the reference, nats.
        draws: number of draws that the numbers hold; None for none.
        probed: results are to have what a probe needs as well.
    """

    numbers: Tensor
    ref_logp: Tensor
    draws: int | None = None
    probed: bool = False

    @classmethod
    def of(cls, inputs: Mapping[str, Any], ref_logp: Tensor, draws: int | None) -> Kept:
        """Read TRL's micro-batch.

        Args:
            inputs: the micro-batch.
            ref_logp: (B, T) log-probs of its tokens under the reference, nats.
            draws: of the spec.

        Raises:
            RuntimeError: the numbers are not there.
        """
        if KEY not in inputs:
            raise RuntimeError(
                "kl-plugins: the reference's most probable tokens are missing in TRL's micro-batch; a subclass that "
                f"makes rollouts or micro-batches of its own has to carry {KEY} along, row by row"
            )
        return cls(inputs[KEY], ref_logp, draws)

    def tokens(self, first: int, scored: ScoredRows) -> Tensor:
        """Return kept tokens and draws (b, T, k + m) of one forward pass; ``first`` as in :meth:`kl_of_states`."""
        return unpacked(self.numbers[first : first + len(scored.attended)], draws=self.draws).tokens

    def kl_of_log_probs(
        self, first: int, log_probs: Tensor, logp: Tensor, scored: ScoredRows, temperature: float
    ) -> TopKKL | ProbedKL:
        """Compute what :meth:`kl_of_states` does from TRL's own log-probs and those of the kept tokens.

        Args:
            first: as in :meth:`kl_of_states`.
            log_probs: (b, T, k + m) of kept tokens and draws under the policy, nats, with their graph.
            logp: (b, T) TRL's log-probs of the tokens under the policy, nats.
            scored: the states of the forward pass.
            temperature: has divided the logits of the policy and of the reference.
        """
        rows = slice(first, first + len(logp))
        labels = scored.input_ids[:, -logp.shape[1] :]
        reference, ref_logp = unpacked(self.numbers[rows], temperature, self.draws), self.ref_logp[rows]
        sides = log_probs, logp.detach(), labels
        found = top_k_kl(*sides, reference=reference, ref_logp=ref_logp, mask=scored.attended)
        found = found._replace(ref_logp=label_log_probs(reference, labels, ref_logp))
        if not self.probed:
            return found
        return ProbedKL(*found, *cells_of(log_probs, labels, reference))

    def kl_of_states(
        self, first: int, hidden: Tensor, head: OutputHead, input_ids: Tensor, attended: Tensor, temperature: float
    ) -> TopKKL | ProbedKL:
        """Compute the KL over set and bucket, and the remainder, in the state before each of the last T tokens.

        Args:
            first: row of this object that belongs to the first row of the other arguments.
            hidden: (b, L, D) last hidden states of the policy, with their graph.
            head: the policy's head.
            input_ids: (b, L) int64.
            attended: (b, T) bool; elsewhere the result is 0 without a gradient.
            temperature: divides the logits of the policy, as it has divided those of the reference.

        Returns:
            (b, T) each, nats, float32. ``ref_logp`` is what the kept tokens say, so that it can be compared with TRL's.
        """
        rows, positions = slice(first, first + len(hidden)), attended.shape[1]
        labels = input_ids[:, -positions:]
        reference, ref_logp = unpacked(self.numbers[rows], temperature, self.draws), self.ref_logp[rows]
        states = scaled(states_before(hidden, positions), head)
        found = linear_kl(
            states,
            head.weight,
            None,
            None,
            labels,
            reference=reference,
            ref_logp=ref_logp,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            mask=attended,
            differentiable_logp=False,
        )
        found = found._replace(ref_logp=label_log_probs(reference, labels, ref_logp))
        if not self.probed:
            return found
        log_probs = log_odds_of_states(states, head, labels, reference) + found.logp.unsqueeze(-1)
        return ProbedKL(*found, *cells_of(log_probs, labels, reference))


@torch.no_grad()
def log_odds_of_states(states: Tensor, head: OutputHead, labels: Tensor, reference: RefTopK) -> Tensor:
    """Compute log(p_a / p_label) of the kept tokens and draws a, from the rows of the head that belong to them.

    Args:
        states: (b, T, D) hidden states as they go into the head.
        head: the policy's head.
        labels: (b, T) int64.
        reference: with the kept tokens (b, T, k), draws (b, T, m), and the temperature.

    Returns:
        (b, T, k + m) nats, float32.
    """
    tokens = torch.cat([reference.tokens, labels[..., None]], -1).flatten(0, 1)
    given = states.flatten(0, 1), head.weight, head.bias, tokens, torch.float32, GATHERED_BYTES
    logits = selected_products(*given).view(*labels.shape, -1)
    places = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    sides = logits, places[..., -1], places[..., :-1]
    return log_odds(*sides, temperature=reference.temperature, softcap=head.softcap)
