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
- The same with m draws of the reference, see `kl_plugins/kernels/exact/draws.py`: the coefficient of the label is
  (u_a - L) p_a / (p_a + m r_a), where r_a is the chance of a draw to give the token. Each draw adds the same function
  of its own token. So the noise is that of the label plus m times that of one draw, under a ~ r instead of a ~ p.
- The same without the bucket: c_a = u_a outside S and 0 in S. This is the sampled estimator whose terms in S are
  replaced by their sum, so it is unbiased as well. It is a comparison and not a spec.

All have the mean p_j (u_j - KL), which is the gradient of the KL. Its squared norm is the second scale of the
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins import exact_kl, reference_top_k
from kl_plugins.kernels.exact.top_tokens import GROUP, group_maxima
from kl_plugins.top_k import top_and_drawn_tokens

KS = (4, 8, 16, 32, 64, 128, 256)
"""The numbers of tokens that are measured."""
PAIRS = ((8, 8), (16, 4), (16, 8), (16, 16), (32, 4), (32, 8), (32, 16), (64, 4), (64, 8))
"""The numbers of tokens and of draws that are measured."""


class StateNoise(NamedTuple):
    """Results per state, float64.

    Attributes:
        kl: (N,) KL of policy to reference, nats.
        gradient: (N,) squared norm of the exact gradient with respect to the logits.
        sampled: (N,) token noise of `k2@loss`.
        bucket: (N, K) token noise of `exact@loss/top:<k>`, one column per k.
        plain: (N, K) the same without the bucket.
        drawn: (N, D) token noise with draws of the reference, one column per pair of k and m.
    """

    kl: Tensor
    gradient: Tensor
    sampled: Tensor
    bucket: Tensor
    plain: Tensor
    drawn: Tensor


def token_noise(p: Tensor, coefficient: Tensor) -> Tensor:
    """Return the variance of a gradient estimate over the drawn token, by the formula of this module.

    Args:
        p: (N, V) probabilities of the policy, float64.
        coefficient: (N, V) c_a of every token that could be drawn, nats.

    Returns:
        (N,) trace of the covariance of the estimate of the logit gradient, nats squared.
    """
    return noise_of_draws(p, p, coefficient)


def noise_of_draws(p: Tensor, chance: Tensor, coefficient: Tensor) -> Tensor:
    """Return the variance of c_a (e_a - p) for a token that is drawn with other chances than those of the policy.

    Args:
        p: (N, V) probabilities of the policy, float64.
        chance: (N, V) chance of each token; what is missing to 1 is the chance of no token, which adds nothing.
        coefficient: (N, V) c_a of every token that could be drawn, nats.

    Returns:
        (N,) trace of the covariance, nats squared.
    """
    square = p.square()
    others = (square.sum(-1, keepdim=True) - square).clamp(min=0)
    second_moment = (chance * coefficient.square() * ((1 - p).square() + others)).sum(-1)
    mean = chance * coefficient - p * (chance * coefficient).sum(-1, keepdim=True)
    return (second_moment - mean.square().sum(-1)).clamp(min=0)


def tail_chances(ref_logits: Tensor, ids: Tensor, depth: int = 3) -> Tensor:
    """Return the chance of one draw to give each token: that of its largest group, times those within the groups.

    It is computed for all tokens at once, and thereby in another way than in the library.

    Args:
        ref_logits: (N, V) logits of the reference, float64.
        ids: (N, k) most probable tokens, the largest first.
        depth: level of the groups that are drawn first.

    Returns:
        (N, V) float64, 0 in the set.
    """
    levels = group_maxima(ref_logits, ids.shape[-1])[: depth + 1]
    bound = ref_logits.gather(-1, ids[:, -1:])
    weights = [(torch.minimum(level, bound) - bound).exp() for level in levels]
    weights[0] = weights[0].masked_fill(ref_logits >= bound, 0.0)
    chance = weights[-1] / weights[-1].sum(-1, keepdim=True)
    for weight in reversed(weights[:-1]):
        groups = weight[:, : chance.shape[-1] * GROUP].view(len(weight), GROUP, -1)
        within = (groups / groups.sum(1, keepdim=True)).nan_to_num(0.0)
        found = torch.zeros_like(weight)
        found[:, : chance.shape[-1] * GROUP] = (chance[:, None] * within).flatten(1)
        chance = found
    return chance


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
def measured(
    logits: Tensor, ref_logits: Tensor, ks: Sequence[int] = KS, pairs: Sequence[tuple[int, int]] = PAIRS
) -> StateNoise:
    """Compute the token noise of all estimators in some states.

    Args:
        logits: (N, V) logits of the policy at temperature 1; a few states at a time, because about ten float64 tensors
            of this shape exist at once.
        ref_logits: (N, V) logits of the reference in the same states.
        ks: numbers of tokens of the sets.
        pairs: numbers of tokens and of draws.
    """
    logp, ref_logp = (part.double().log_softmax(-1) for part in (logits, ref_logits))
    p, u = logp.exp(), logp - ref_logp
    kl = (p * u).sum(-1)
    ids = reference_top_k(ref_logits.double(), max(*ks, *(k for k, _ in pairs))).ids
    bucket: list[Tensor] = []
    plain: list[Tensor] = []
    for k in ks:
        for found, coefficient in zip((bucket, plain), top_coefficients(logp, ref_logp, ids[:, :k]), strict=True):
            found.append(token_noise(p, coefficient))
    drawn: list[Tensor] = []
    for k, count in pairs:
        coefficient, chance = (
            top_coefficients(logp, ref_logp, ids[:, :k])[0],
            tail_chances(ref_logits.double(), ids[:, :k]),
        )
        shared = (coefficient * p / (p + count * chance)).nan_to_num(0.0)
        drawn.append(token_noise(p, shared) + count * noise_of_draws(p, chance, shared))
    gradient = (p * (u - kl[:, None])).square().sum(-1)
    columns = (torch.stack(part, -1) for part in (bucket, plain, drawn))
    return StateNoise(kl, gradient, token_noise(p, u), *columns)


@torch.no_grad()
def library_difference(logits: Tensor, ref_logits: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> float:
    """Compare the coefficients and the chances of this module with those that the library gives for drawn tokens.

    Args:
        logits, ref_logits: (N, V) logits of policy and reference.
        labels: (N,) drawn tokens.
        ks: numbers of tokens of the sets.

    Returns:
        The largest absolute difference between `exact_kl(..., reference=).remainder` and `top_coefficients`, nats, and
        between the chances of the labels to be drawn.
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
        _, draws = top_and_drawn_tokens(ref_logits, labels, k, 1)
        chance = tail_chances(ref_logits, kept.ids).gather(-1, labels[:, None])[:, 0]
        largest = max(largest, float((draws.label_log_rate.exp() - chance).abs().max()))
    return largest
