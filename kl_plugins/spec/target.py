"""Which gradient a spec estimates in expectation, and what to know beside it.

The verdicts are those of exact enumeration (``tests/oracle``), not of a reading of the formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kl_plugins.estimators import find_estimator

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec

TARGETS: dict[str, str] = {
    "reverse_kl_sequence": "gradient of KL(policy || reference) of whole sequences",
    "reverse_kl_token": "reverse-KL gradient of each token on the policy's own states; how states shift is ignored",
    "reverse_kl_token_behaviour": "reverse-KL gradient of each token on the behaviour policy's states",
    "forward_kl_token": "gradient of KL(reference || policy) of each token on the policy's own states",
    "forward_kl_token_behaviour": "gradient of KL(reference || policy) of each token on the behaviour policy's states",
    "other_f_token": "gradient of another f-divergence of each token on the policy's own states",
    "other_f_token_behaviour": "gradient of another f-divergence of each token on the behaviour policy's states",
    "other_f_sequence": "gradient of the sum of another f-divergence's terms along the policy's sequences",
    "none": "the gradient of no divergence",
}


OLD_CAVEAT = "behaviour:old is exact only where the old policy drew the samples, not a different sampler"
"""Said whenever the importance weight divides by old log-probs, whether the user asked for them or not."""


def target_of(spec: KLSpec) -> str:
    """The key of :data:`TARGETS` that the spec's expected gradient is.

    Data are read as coming from the behaviour policy; with ``is:none`` as on-policy.
    """
    if spec.placement == "reward":
        # A score placed in the reward acts as reward-to-go: only k1's is a divergence's gradient.
        return "reverse_kl_sequence" if spec.estimator == "k1" else "none"
    if spec.placement == "advantage":
        if spec.estimator not in ("k1", "exact"):
            return "none"
        return "reverse_kl_token" if spec.horizon == "token" else "reverse_kl_sequence"
    return _loss_target(spec)


def _loss_target(spec: KLSpec) -> str:
    row = find_estimator(spec.estimator)
    if row is None or row.kind == "none":
        return "none"
    if spec.horizon == "token":
        on_behaviour_states = spec.clip is not None or spec.correction == "token"
        return f"{row.kind}_token_behaviour" if on_behaviour_states else f"{row.kind}_token"
    if spec.clip is not None or spec.correction in ("token", "prefix"):
        return "none"  # a future term needs weights over all of its tokens
    if row.kind == "reverse_kl":  # whichever future term: each has mean KL_j
        return "reverse_kl_sequence"
    return "other_f_sequence" if spec.future == "own" else "none"


def caveats_with_source(spec: KLSpec, source: str) -> tuple[str, ...]:
    """The spec's caveats, once a host has decided where the behaviour policy's log-probs come from.

    Args:
        spec: a parsed spec.
        source: ``old`` or ``current`` (the trainer's own log-probs), ``sampler``, ``unused``.
    """
    by_old = spec.needs_behaviour and spec.behaviour is None and source in ("old", "current")
    return (*((OLD_CAVEAT,) if by_old else ()), *spec.caveats)


def caveats_of(spec: KLSpec) -> tuple[str, ...]:
    """Sentences on what keeps the target but bends the estimate."""
    found: list[str] = []
    score = spec.placement != "loss"
    if spec.placement == "loss" and spec.estimator == "exact" and spec.correction == "none" and spec.horizon == "token":
        if spec.top is None:
            found.append("off-policy, this is exactly the reverse-KL gradient on the behaviour policy's states")
        else:
            found.append(
                "off-policy, the sampled tail of top: is biased, because its token was drawn from another policy: 20 % "
                "in one example; without top: nothing is sampled"
            )
    elif not score and not spec.needs_behaviour:
        found.append("is:none reads the data as on-policy; on stale or mismatched samples the gradient is biased")
    if score:
        found.append("the host's own importance weight on the policy-gradient term is the only off-policy correction")
    if spec.behaviour == "old":
        found.append(OLD_CAVEAT)
    if spec.cap is not None:
        found.append("cap truncates large weights: lower variance, and tokens that the policy moved towards count less")
    if spec.band is not None:
        found.append("band drops tokens whose weight is outside it: lower variance, biased by what is dropped")
    if spec.norm:
        found.append("norm divides by the mean weight of the tokens passed, so the result depends on micro-batching")
    if spec.clip is not None:
        found.append(
            "clip drops the KL gradient of tokens whose importance weight left the interval on the clipped side"
        )
    if spec.horizon == "sequence" and spec.gamma < 1:
        found.append("gamma < 1 discounts the future KL: lower variance, biased towards the token-local gradient")
    if spec.horizon == "token" and spec.target != "none":
        found.append("token horizon leaves out the future-KL term: how today's token changes tomorrow's states")
    if spec.correction in ("prefix", "sequence", "decision"):
        found.append("products of importance weights decay or explode with length: watch kl/ess")
    if spec.placement == "reward":
        found.append("what the host does with a KL in the reward differs (normalisation, clipping): see its receipt")
    if spec.placement == "advantage" and spec.horizon == "sequence" and spec.future == "k3":
        found.append(
            "a k3 future term has the same mean as k1, less variance near the reference, a heavy tail far from it"
        )
    return tuple(found)
