"""``top:`` in TRL: the reference's most probable tokens, found while TRL scores a rollout and used in its updates.

TRL's batch carries them between the two, see :mod:`kl_plugins.adapters.top_k`. So the reference does not run in the
updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from kl_plugins.adapters.top_k import KEY, label_log_probs, packed, unpacked
from kl_plugins.adapters.trl.exact import OutputHead, scaled, states_before
from kl_plugins.exact import TopKKL, linear_kl
from kl_plugins.reference import linear_reference_top_k


def top_k_of_states(hidden: Tensor, head: OutputHead, attended: Tensor, k: int, temperature: float) -> Tensor:
    """Find the reference's k most probable tokens in the state before each of the last T tokens.

    Args:
        hidden: (B, L, D) last hidden states of the reference.
        head: the reference's head.
        attended: (B, T) bool; elsewhere nothing is computed.
        k: number of tokens.
        temperature: divides the logits.

    Returns:
        (B, T, 2 k + 1) float32, as :func:`kl_plugins.adapters.top_k.packed` gives them; 0 where not attended.
    """
    states = scaled(states_before(hidden, attended.shape[1])[attended], head)
    kept = linear_reference_top_k(states, head.weight, k, bias=head.bias, temperature=temperature, softcap=head.softcap)
    numbers = packed(kept)
    found = numbers.new_zeros(*attended.shape, numbers.shape[-1])
    found[attended] = numbers
    return found


class Kept(NamedTuple):
    """What is known of the reference at the tokens of a rollout or a micro-batch.

    Attributes:
        numbers: (B, T, 2 k + 1) what :func:`top_k_of_states` gave.
        ref_logp: (B, T) TRL's own log-probs of the tokens under the reference, nats.
    """

    numbers: Tensor
    ref_logp: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any], ref_logp: Tensor) -> Kept:
        """Read TRL's micro-batch.

        Args:
            inputs: the micro-batch.
            ref_logp: (B, T) log-probs of its tokens under the reference, nats.

        Raises:
            RuntimeError: the numbers are not there.
        """
        if KEY not in inputs:
            raise RuntimeError(
                "kl-plugins: the reference's most probable tokens are missing in TRL's micro-batch; a subclass that "
                f"makes rollouts or micro-batches of its own has to carry {KEY} along, row by row"
            )
        return cls(inputs[KEY], ref_logp)

    def kl_of_states(
        self, first: int, hidden: Tensor, head: OutputHead, input_ids: Tensor, attended: Tensor, temperature: float
    ) -> TopKKL:
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
        reference, ref_logp = unpacked(self.numbers[rows], temperature), self.ref_logp[rows]
        found = linear_kl(
            scaled(states_before(hidden, positions), head),
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
        return found._replace(ref_logp=label_log_probs(reference, labels, ref_logp))
