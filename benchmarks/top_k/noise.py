"""The token noise of the KL estimators in given states, computed from the whole softmax without sampling.

In a state with logits z, let p and r be the probabilities of policy and reference, u_j = log(p_j / r_j), and e_a the
unit vector of token a. The gradient of log p_a with respect to z is e_a - p. Every estimator here has the gradient

    g(a) = D + c_a (e_a - p)

for the drawn token a, with a part D that does not depend on a. The token noise is the trace of its covariance under
a ~ p. D cancels, and what remains has a closed form:

    noise = sum_a p_a c_a^2 |e_a - p|^2 - sum_j p_j^2 (c_j - C)^2,
    |e_a - p|^2 = (1 - p_a)^2 + sum_{j != a} p_j^2,    C = sum_a p_a c_a.

The second sum is the squared mean of c_a (e_a - p), because its j-th entry is p_j c_j - p_j C.

The coefficients are:

- `k2@loss`: c_a = u_a, and D = 0.
- `exact@loss`: c_a = 0.
- `exact@loss/top:<k>`, with S the k most probable tokens of the reference: c_a = u_a - L outside S and 0 in S. Here
  L = log(P / R) is the log-ratio of the bucket, and P and R are what policy and reference leave outside S.
- The same without the bucket: c_a = u_a outside S and 0 in S. This is the sampled estimator whose terms in S are
  replaced by their sum, so it is unbiased as well. It is a comparison and not a spec.

All four have the mean p_j (u_j - KL), which is the gradient of the KL. Its squared norm is the second scale of the
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins import exact_kl, reference_top_k

KS = (4, 8, 16, 32, 64, 128, 256)
"""The numbers of tokens that are measured."""


class StateNoise(NamedTuple):
    """Results per state, float64.

    Attributes:
        kl: (N,) KL of policy to reference, nats.
        gradient: (N,) squared norm of the exact gradient with respect to the logits.
        sampled: (N,) token noise of `k2@loss`.
        bucket: (N, K) token noise of `exact@loss/top:<k>`, one column per k.
        plain: (N, K) the same without the bucket.
    """

    kl: Tensor
    gradient: Tensor
    sampled: Tensor
    bucket: Tensor
    plain: Tensor


def token_noise(p: Tensor, coefficient: Tensor) -> Tensor:
    """Return the variance of a gradient estimate over the drawn token, by the formula of this module.

    Args:
        p: (N, V) probabilities of the policy, float64.
        coefficient: (N, V) c_a of every token that could be drawn, nats.

    Returns:
        (N,) trace of the covariance of the estimate of the logit gradient, nats squared.
    """
    square = p.square()
    others = (square.sum(-1, keepdim=True) - square).clamp(min=0)
    second_moment = (p * coefficient.square() * ((1 - p).square() + others)).sum(-1)
    mean = p * (coefficient - (p * coefficient).sum(-1, keepdim=True))
    return (second_moment - mean.square().sum(-1)).clamp(min=0)


def top_coefficients(logp: Tensor, ref_logp: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the sampled part of `exact@loss/top:<k>`, with and without the bucket.

    Args:
        logp, ref_logp: (N, V) log-probs of all tokens under policy and reference, nats, float64.
        ids: (N, k) tokens of the set.

    Returns:
        Two (N, V) tensors, nats: u - L outside the set, and u outside the set; both are 0 in the set.
    """
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter_(-1, ids, True)
    tail, ref_tail = (part.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True) for part in (logp, ref_logp))
    level = (tail - ref_tail).masked_fill(tail == -torch.inf, 0.0)  # an empty bucket has no log-ratio
    u = logp - ref_logp
    return (u - level).masked_fill(inside, 0.0), u.masked_fill(inside, 0.0)


@torch.no_grad()
def measured(logits: Tensor, ref_logits: Tensor, ks: Sequence[int] = KS) -> StateNoise:
    """Compute the token noise of all estimators in some states.

    Args:
        logits: (N, V) logits of the policy at temperature 1; a few states at a time, because about ten float64 tensors
            of this shape exist at once.
        ref_logits: (N, V) logits of the reference in the same states.
        ks: numbers of tokens of the sets.
    """
    logp, ref_logp = (part.double().log_softmax(-1) for part in (logits, ref_logits))
    p, u = logp.exp(), logp - ref_logp
    kl = (p * u).sum(-1)
    ids = reference_top_k(ref_logits.double(), max(ks)).ids
    bucket: list[Tensor] = []
    plain: list[Tensor] = []
    for k in ks:
        for found, coefficient in zip((bucket, plain), top_coefficients(logp, ref_logp, ids[:, :k]), strict=True):
            found.append(token_noise(p, coefficient))
    gradient = (p * (u - kl[:, None])).square().sum(-1)
    return StateNoise(kl, gradient, token_noise(p, u), torch.stack(bucket, -1), torch.stack(plain, -1))


@torch.no_grad()
def library_difference(logits: Tensor, ref_logits: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> float:
    """Compare the coefficients of this module with those that the library gives for drawn tokens.

    Args:
        logits, ref_logits: (N, V) logits of policy and reference.
        labels: (N,) drawn tokens.
        ks: numbers of tokens of the sets.

    Returns:
        The largest absolute difference between `exact_kl(..., reference=).remainder` and `top_coefficients`, nats.
    """
    logits, ref_logits = logits.double(), ref_logits.double()
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    label_logp = ref_logp.gather(-1, labels[:, None])[:, 0]
    largest = 0.0
    for k in ks:
        kept = reference_top_k(ref_logits, k)
        found = exact_kl(logits, None, labels, reference=kept, ref_logp=label_logp, backend="eager")
        own = top_coefficients(logp, ref_logp, kept.ids)[0].gather(-1, labels[:, None])[:, 0]
        largest = max(largest, float((found.remainder - own).abs().max()))
    return largest
