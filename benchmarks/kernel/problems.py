"""The tensors that the contestants get: logits, or hidden states with output heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGIT_STD, SHIFT = 4.0, 0.1
"""Standard deviations of the logits, and of the difference between the logits of policy and reference, in nats."""
ROWS = 256
"""Number of rows whose float32 logits exist at the same time while a problem is made."""


class Size(NamedTuple):
    """Size of a problem.

    Attributes:
        tokens: number of tokens N.
        vocab: number of tokens in the vocabulary V.
        width: width D of the hidden states; 0 if the problem starts from logits.
    """

    tokens: int
    vocab: int
    width: int = 0

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width else ""
        return f"{self.tokens} tokens, vocabulary {self.vocab}{width}"


class Problem(NamedTuple):
    """Policy and reference of one size; only tensors of the policy require a gradient.

    Attributes:
        size: size of the problem.
        policy: (N, V) logits, or (N, D) hidden states, of the policy.
        reference: (N, V) logits, or (N, D) hidden states, of the reference.
        weight: (V, D) head of the policy, or None.
        ref_weight: (V, D) head of the reference, or None.
        labels: (N,) int64 tokens.
        ref_logp: (N,) log-probs of the labels under the reference, nats, float32.
        token_weight: (N,) weight of each token's term in the loss.
    """

    size: Size
    policy: Tensor
    reference: Tensor
    weight: Tensor | None
    ref_weight: Tensor | None
    labels: Tensor
    ref_logp: Tensor
    token_weight: Tensor

    def clear(self) -> None:
        """Delete the gradients."""
        self.policy.grad = None
        if self.weight is not None:
            self.weight.grad = None


def problem(size: Size, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Make a random problem; the same arguments give the same problem."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std

    labels = torch.randint(size.vocab, (size.tokens,), generator=generator, device=device)
    weight = torch.rand(size.tokens, generator=generator, device=device) / size.tokens
    if size.width == 0:
        exact = normal(size.tokens, size.vocab, std=LOGIT_STD)
        policy = (exact + normal(size.tokens, size.vocab, std=SHIFT)).to(dtype).requires_grad_()
        reference = exact.to(dtype)
        return Problem(size, policy, reference, None, None, labels, label_log_probs(reference, None, labels), weight)
    hidden = normal(size.tokens, size.width, std=1.0)
    policy = (hidden + normal(size.tokens, size.width, std=SHIFT / LOGIT_STD)).to(dtype).requires_grad_()
    head = normal(size.vocab, size.width, std=LOGIT_STD / size.width**0.5).to(dtype)
    reference = hidden.to(dtype)
    logp = label_log_probs(reference, head, labels)
    return Problem(size, policy, reference, head.clone().requires_grad_(), head, labels, logp, weight)


def label_log_probs(rows: Tensor, head: Tensor | None, labels: Tensor) -> Tensor:
    """Return the log-probs of the labels, nats, float32, of shape (N,).

    Args:
        rows: (N, V) logits, or (N, D) hidden states.
        head: (V, D) output head; None if ``rows`` are logits.
        labels: (N,) int64 tokens.
    """
    parts = []
    for part, chosen in zip(rows.split(ROWS), labels.split(ROWS), strict=True):
        logits = part.float() if head is None else part.float() @ head.T.float()
        parts.append(logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)
