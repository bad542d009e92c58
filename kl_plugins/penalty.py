"""The KL penalty that a host subtracts from a score: ``kl_penalty`` for ``@reward`` and ``@advantage`` specs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kl_plugins.horizon import future_sum
from kl_plugins.kernels import backend
from kl_plugins.kernels.sampled import score_terms
from kl_plugins.numerics import Limits, cast_saturating, check_shapes, compute_dtype, masked_difference, masked_exact
from kl_plugins.term import require_exact

if TYPE_CHECKING:
    from torch import Tensor

    from kl_plugins.spec import KLSpec


def kl_penalty(
    spec: KLSpec,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    exact: Tensor | None = None,
    remainder: Tensor | None = None,
) -> Tensor:
    """Compute the penalty of each token, detached, in nats, before multiplication by beta.

    See arXiv 2601.10201 (FRPO) for ``@advantage``, and 1909.08593 for ``@reward``.

    Args:
        spec: a parsed ``@reward`` or ``@advantage`` spec.
        logp: (B, T) log-probs of the rollout, nats, computed by the trainer and not by the inference engine.
        ref_logp: (B, T) log-probs of the reference at the same temperature, nats.
        mask: (B, T), True on response tokens.
        exact: (B, T) KL per state, nats, for an exact future term. It is taken over the whole vocabulary, or with
            ``top:`` over a set of tokens and one bucket for all others.
        remainder: (B, T) contribution of the sampled token that a set and bucket leave out, nats; see ``kl_term``.

    Returns:
        (B, T) in the dtype of ``logp``, 0 outside the mask. For ``@reward`` it is k_t of each token. For ``@advantage``
        it is the own term plus, with ``horizon:sequence``, the discounted future terms.

    Raises:
        ValueError: if the spec is a ``@loss`` spec, a shape differs, or exact values that the spec needs are missing.
    """
    if spec.placement == "loss":
        raise ValueError(f"kl_penalty is for @reward and @advantage specs; {spec} is a loss: use kl_term")
    check_shapes(mask, logp=logp, ref_logp=ref_logp, exact=exact, remainder=remainder)
    require_exact(spec, exact, remainder)
    mask = mask.bool()
    u = masked_difference(logp.detach(), ref_logp.detach(), mask, compute_dtype(logp, ref_logp))
    given = (None if part is None else part.detach() for part in (exact, remainder))
    penalty = backend.run(_penalty, spec, u, mask, *given, like=u)
    return cast_saturating(penalty, logp.dtype)


def _penalty(spec: KLSpec, u: Tensor, mask: Tensor, exact: Tensor | None, remainder: Tensor | None) -> Tensor:
    limits = Limits.of(u.dtype, spec.bound)
    value, future = score_terms(spec, u, mask, exact)
    if remainder is not None and spec.future == "exact":
        future = future + limits.linear(masked_exact(remainder, mask, u.dtype))
    if spec.horizon == "sequence":
        value = value + future_sum(future, mask, spec.gamma)
    return limits.saturate(value)
