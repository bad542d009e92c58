"""The tensors that every contestant gets: logits, or hidden states with output heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGIT_STD, SHIFT = 4.0, 0.1
"""Spread of the logits, and how far the reference's stand from them, in nats."""


class Size(NamedTuple):
    """Tokens, vocabulary and width of the hidden states (0: the problem starts from logits)."""

    tokens: int
    vocab: int
    width: int = 0

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width else ""
        return f"{self.tokens} tokens, vocabulary {self.vocab}{width}"


class Problem(NamedTuple):
    """Policy and reference of one size; what requires a gradient belongs to the policy.

    Attributes:
        size: its size.
        policy: (N, V) logits, or (N, D) hidden states.
        reference: the same of the reference.
        weight: (V, D) the policy's head, or None.
        ref_weight: (V, D) the reference's head, or None.
        labels: (N,) int64.
        token_weight: (N,) what each token's term counts for in the loss.
    """

    size: Size
    policy: Tensor
    reference: Tensor
    weight: Tensor | None
    ref_weight: Tensor | None
    labels: Tensor
    token_weight: Tensor

    def clear(self) -> None:
        """Drop the gradients."""
        self.policy.grad = None
        if self.weight is not None:
            self.weight.grad = None


def problem(size: Size, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Random, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std

    labels = torch.randint(size.vocab, (size.tokens,), generator=generator, device=device)
    weight = torch.rand(size.tokens, generator=generator, device=device) / size.tokens
    if size.width == 0:
        reference = normal(size.tokens, size.vocab, std=LOGIT_STD)
        policy = (reference + normal(size.tokens, size.vocab, std=SHIFT)).to(dtype).requires_grad_()
        return Problem(size, policy, reference.to(dtype), None, None, labels, weight)
    hidden = normal(size.tokens, size.width, std=1.0)
    policy = (hidden + normal(size.tokens, size.width, std=SHIFT / LOGIT_STD)).to(dtype).requires_grad_()
    head = normal(size.vocab, size.width, std=LOGIT_STD / size.width**0.5).to(dtype)
    return Problem(size, policy, hidden.to(dtype), head.clone().requires_grad_(), head, labels, weight)
