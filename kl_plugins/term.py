"""The KL term that is added to the policy loss: ``kl_term`` for ``@loss`` specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kl_plugins.kernels import backend
from kl_plugins.kernels.sampled import SampledTerms, log_ratios, loss_terms, sampled_loss
from kl_plugins.metrics import term_metrics
from kl_plugins.numerics import cast_saturating, check_shapes, compute_dtype, masked_exact

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kl_plugins.spec import KLSpec


@dataclass(frozen=True)
class KLTerm:
    """Result of :func:`kl_term`. All tensors are (B, T), 0 outside the mask, in the dtype of ``logp``.

    Attributes:
        value: detached value of the estimator, k_t, without weight and future terms, nats.
        coefficient: detached factor of grad log pi, with the weight included. For an exact own term, it holds only the
            future part and the remainder of ``top:``.
        loss: value + coefficient * (logp - logp.detach()); multiply by beta, then aggregate as the host does.
        weight: detached importance weight, 1 if the spec has none; with ``top:`` the weight of the remainder.
        metrics: 0-d tensors by key; see :mod:`kl_plugins.metrics`.
    """

    value: Tensor
    coefficient: Tensor
    loss: Tensor
    weight: Tensor
    metrics: dict[str, Tensor]


def kl_term(
    spec: KLSpec,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    old_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    exact: Tensor | None = None,
    remainder: Tensor | None = None,
) -> KLTerm:
    """Compute the per-token KL term whose gradient is the one that the spec names.

    See arXiv 2510.01555 for why the coefficient determines the gradient, and not the value. See ``docs/specs.md`` for
    each formula.

    Args:
        spec: a parsed ``@loss`` spec.
        logp: (B, T) log-probs of the policy being trained, nats, with its autograd graph.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on response tokens.
        old_logp: (B, T) log-probs of the trainer's own policy at rollout time.
        sampler_logp: (B, T) log-probs that the inference engine sampled with. With ``is:none``, only metrics use them.
        exact: (B, T) KL(policy || reference) per state, nats, with its graph, for specs with exact terms. It is taken
            over the whole vocabulary, or with ``top:`` over a set of tokens and one bucket for all others.
        remainder: (B, T) contribution of the sampled token that a set and bucket leave out, nats, as ``exact_kl`` and
            ``linear_kl`` return it with ``reference=``. A spec with ``top:`` needs it.

    Returns:
        The term; see :class:`KLTerm`.

    Raises:
        ValueError: if the spec is not a ``@loss`` spec, a shape differs, log-probs that the spec needs are missing, or
            a remainder is given without ``top:``.
    """
    if spec.placement != "loss":
        raise ValueError(f"kl_term is for @loss specs; {spec} is a score: use kl_penalty")
    given = {"logp": logp, "ref_logp": ref_logp, "old_logp": old_logp, "sampler_logp": sampler_logp}
    check_shapes(mask, **given, exact=exact, remainder=remainder)
    require_exact(spec, exact, remainder)
    mask = mask.bool()
    dtype = compute_dtype(logp, ref_logp)
    behaviour = behaviour_log_probs(spec, old_logp, sampler_logp)
    detached = [None if t is None else t.detach() for t in (logp, ref_logp, behaviour, exact, remainder)]
    terms, metrics = backend.run(_terms_and_metrics, spec, *detached, mask, dtype, like=logp)
    own = (None, terms.weight) if terms.exact_weight is None else (exact, terms.exact_weight)
    loss = sampled_loss(logp, own[0], terms.value, terms.coefficient, own[1], mask)
    return KLTerm(
        value=cast_saturating(terms.value, logp.dtype),
        coefficient=cast_saturating(terms.coefficient, logp.dtype),
        loss=loss,
        weight=cast_saturating(terms.weight, logp.dtype),
        metrics=metrics,
    )


def _terms_and_metrics(
    spec: KLSpec,
    logp: Tensor,
    ref_logp: Tensor,
    behaviour_logp: Tensor | None,
    exact: Tensor | None,
    remainder: Tensor | None,
    mask: Tensor,
    dtype: torch.dtype,
) -> tuple[SampledTerms, dict[str, Tensor]]:
    # Terms and metrics are one function, so that the compiled path reads the log-probs once. Otherwise the metrics
    # would cost as much as the terms.
    u, log_rho = log_ratios(logp, ref_logp, behaviour_logp, mask, dtype)
    exact_value, rest = (None if part is None else masked_exact(part, mask, dtype) for part in (exact, remainder))
    terms = loss_terms(spec, u, log_rho, mask, exact_value, rest)
    return terms, term_metrics(terms, u, log_rho, mask, exact_value, bucket=remainder is not None)


def behaviour_log_probs(spec: KLSpec, old_logp: Tensor | None, sampler_logp: Tensor | None) -> Tensor | None:
    """Return the log-probs that the weight divides by.

    If the spec names log-probs, these are returned. By default they are the sampler's, or the old policy's if the
    sampler's are missing.

    Raises:
        ValueError: if the spec has a weight and the log-probs for it are missing.
    """
    given = {"sampler": sampler_logp, "old": old_logp}
    if spec.behaviour is not None:
        if given[spec.behaviour] is None:
            raise ValueError(f"{spec} needs {spec.behaviour}_logp, which was not given")
        return given[spec.behaviour]
    behaviour = sampler_logp if sampler_logp is not None else old_logp
    if behaviour is None and spec.needs_behaviour:
        raise ValueError(
            f"{spec} weights by policy/behaviour, but neither sampler_logp nor old_logp was given; "
            "pass logp.detach() as old_logp if the data are on-policy"
        )
    return behaviour


def require_exact(spec: KLSpec, exact: Tensor | None, remainder: Tensor | None) -> None:
    """Check that the exact values that the spec needs were given, and that the spec can use the remainder.

    Args:
        spec: a parsed spec.
        exact: (B, T) nats, or None.
        remainder: (B, T) nats, or None.

    Raises:
        ValueError: if a value is missing, or a remainder is given without ``top:``.
    """
    if spec.needs_exact and exact is None:
        raise ValueError(f"{spec} needs the full-vocabulary KL of every state: pass exact=(B, T)")
    if remainder is not None and spec.top is None:
        raise ValueError(f"{spec} sums over the whole vocabulary, which leaves no remainder: drop remainder=")
    if remainder is None and spec.needs_exact and spec.top is not None:
        raise ValueError(f"{spec} needs the contribution of the sampled token: pass remainder=(B, T)")
