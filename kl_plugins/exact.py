"""Full-vocabulary KL from logits or hidden states. The kernels are not part of this version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


class ExactKL(NamedTuple):
    """Per-token results, float32: full-vocabulary KL (nats), log-prob of the label under policy and reference."""

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor


class ExactKLUnavailableError(RuntimeError):
    """An exact spec was to be computed: this version parses and explains exact specs but cannot compute them."""


def _unavailable(name: str) -> NoReturn:
    raise ExactKLUnavailableError(
        f"{name}: the full-vocabulary kernel is not part of this version of kl-plugins. "
        "Use a sampled spec, e.g. k2@loss/is:token, or pass your own per-state KL to kl_term(..., exact=...)."
    )


def exact_kl(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> ExactKL:
    """Full-vocabulary KL(policy || reference) per token; not available in this version.

    Raises:
        ExactKLUnavailableError: always.
    """
    _unavailable("exact_kl")


def linear_kl(*args: Any, **kwargs: Any) -> ExactKL:
    """Full-vocabulary KL from hidden states and the output head; not available in this version.

    Raises:
        ExactKLUnavailableError: always.
    """
    _unavailable("linear_kl")
