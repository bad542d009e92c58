"""Hidden states and an output head with a known distance, and the gradients that each way of calling gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kl_plugins import linear_kl
from tests.core.exact.support import textbook


def heads(
    tokens: int = 40,
    width: int = 32,
    vocabulary: int = 300,
    *,
    distance: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A reference and a policy whose hidden states are `distance` away; logits of standard deviation 3."""
    torch.manual_seed(0)
    ref_hidden = torch.randn(tokens, width)
    weight = torch.randn(vocabulary, width) * 3 / width**0.5
    return {
        "hidden": (ref_hidden + distance * torch.randn(tokens, width)).to(dtype),
        "weight": weight.to(dtype),
        "ref_hidden": ref_hidden.to(dtype),
        "ref_weight": weight.to(dtype),
        "labels": torch.randint(0, vocabulary, (tokens,)),
    }


def gradients(given: dict[str, Tensor], weights: Tensor, mode: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """kl, and the gradients of sum(weights kl - weights^2 logp), by one of the modes."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in ("hidden", "weight")}
    arguments = {**given, **leaves}
    if mode == "loss":
        found = linear_kl(**arguments, kl_weight=weights, logp_weight=-weights.square(), **options)
        loss, kl = found.loss, found.kl
        assert not kl.requires_grad
    elif mode == "autograd":
        kl, logp, _ = linear_kl(**arguments, **options)
        loss = (weights * kl - weights.square() * logp).sum()
    else:
        hidden, weight, ref_hidden, ref_weight, labels = (arguments[name].double() for name in arguments)
        kl, logp, _ = textbook(hidden @ weight.t(), ref_hidden @ ref_weight.t(), labels.long())
        loss = (weights * kl - weights.square() * logp).sum()
    (3 * loss).backward()
    return kl.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
