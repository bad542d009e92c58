"""A stand-in for the trainer's ``beta``: the host multiplies it by its own KL, and gets the spec's instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""What the host's ``beta * kl`` becomes, given the host's own KL."""


class SubstitutedBeta(float):
    """A float in every respect but one: its product with a tensor is what the adapter says."""

    product: Product
    uses: int

    def __new__(cls, value: float, product: Product) -> SubstitutedBeta:
        """A float of this value."""
        self = super().__new__(cls, value)
        self.product, self.uses = product, 0
        return self

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return float(self) * other
        self.uses += 1
        return self.product(other)

    __rmul__ = __mul__


@contextmanager
def substituted_beta(trainer: Any, product: Product) -> Iterator[None]:
    """Within the block, ``trainer.beta * kl`` is ``product(kl)``; the host has to use it exactly once.

    Raises:
        RuntimeError: the host did not multiply by beta, or did so more than once.
    """
    beta = trainer.beta
    # A coefficient that a user sets to 0 during the run must not make the host leave its KL term out.
    shim = trainer.beta = SubstitutedBeta(beta or 1.0, product)
    try:
        yield
    finally:
        trainer.beta = beta
    if shim.uses != 1:
        raise RuntimeError(
            f"kl-plugins: {type(trainer).__name__} used beta {shim.uses} times where it should have done so once; "
            "its loss takes a path that kl-plugins does not know, so the KL regulariser would be wrong. "
            "Use one of TRL's own GRPOTrainer or RLOOTrainer, or set kl to null."
        )


@contextmanager
def reference_scored(trainer: Any) -> Iterator[None]:
    """Within the block, the host scores the reference, also where a user has set beta to 0 for the time being."""
    beta = trainer.beta
    trainer.beta = beta or 1.0
    try:
        yield
    finally:
        trainer.beta = beta
