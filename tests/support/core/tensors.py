"""Batches of log-probs and masks for the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins import KLSpec


class Batch(NamedTuple):
    """Log-probs of policy, reference, trainer's old policy and sampler, and exact values; all (B, T), nats.

    ``exact`` is the full-vocabulary KL, or with ``top:`` that of a set and a bucket, which ``remainder`` completes.
    """

    logp: Tensor
    ref: Tensor
    old: Tensor
    sampler: Tensor
    exact: Tensor
    remainder: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(*(x.to(dtype) for x in self[:6]), self.mask)

    def leaves(self) -> Batch:
        """The same with gradients wanted for ``logp`` and ``exact``."""
        logp, exact = (x.detach().clone().requires_grad_() for x in (self.logp, self.exact))
        return self._replace(logp=logp, exact=exact)

    def keywords(self, spec: KLSpec) -> dict[str, Tensor]:
        """What ``kl_term`` takes by name."""
        return {"old_logp": self.old, "sampler_logp": self.sampler} | self.exact_keywords(spec)

    def exact_keywords(self, spec: KLSpec) -> dict[str, Tensor]:
        """``exact`` and ``remainder``, only where the spec has a use for them."""
        found = {"exact": self.exact} if spec.needs_exact else {}
        return found | ({} if spec.top is None else {"remainder": self.remainder})


def masks(rows: int, length: int) -> dict[str, Tensor]:
    """Masks by name: empty, full, padded, with holes, with one empty row."""
    full = torch.ones(rows, length, dtype=torch.bool)
    padded = torch.arange(length)[None] < 1 + torch.arange(rows)[:, None] % max(length, 1)
    holes = (torch.arange(length)[None] + torch.arange(rows)[:, None]) % 3 != 1
    one_empty = full.clone()
    one_empty[:1] = False
    return {"empty": ~full, "full": full, "padded": padded, "holes": holes, "one-empty-row": one_empty}


def batch(rows: int = 3, length: int = 6, mask: str = "holes", seed: int = 0, scale: float = 0.7) -> Batch:
    """A tame random batch in float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(rows, length, dtype=torch.float64, generator=generator) * scale for _ in range(6)]
    logp = -noise[0].abs() - 0.5
    others = (logp + noise[1], logp + noise[2], logp + noise[3], noise[4].abs())
    remainder = noise[5].masked_fill(noise[5] < -0.5 * scale, 0.0)  # of a token in the set
    return Batch(logp, *others, remainder, masks(rows, length)[mask])
