"""Which gradient a spec estimates in expectation, and its caveats.

The verdicts are those of exact enumeration (``tests/oracle``), not of a reading of the formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kl_plugins.estimators import find_estimator
from kl_plugins.spec.options import OPTIONS
from kl_plugins.spec.weight_options import OLD_CAVEAT

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


def target_of(spec: KLSpec) -> str:
    """Return the key of :data:`TARGETS` that names the expected gradient of the spec.

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
    """Reasons why the estimate can deviate from the target, one sentence each."""
    found: list[str] = []
    score = spec.placement != "loss"
    if spec.placement == "loss" and spec.estimator == "exact" and spec.correction == "none" and spec.horizon == "token":
        if spec.top is None:
            found.append("off-policy, this is exactly the reverse-KL gradient on the behaviour policy's states")
        else:
            found.append(
                "off-policy, the sampled remainder of top: is biased, because its token was drawn from another policy "
                "(20 % in one example); is:token beside it weights the remainder alone"
            )
    elif not score and not spec.needs_behaviour:
        found.append("is:none reads the data as on-policy; on stale or mismatched samples the gradient is biased")
    if score:
        found.append("the host's own importance weight on the policy-gradient term is the only off-policy correction")
    if spec.placement == "reward":
        found.append("what the host does with a KL in the reward differs (normalisation, clipping): see its receipt")
    found += filter(None, (row.said(row.caveat, spec, "") for row in OPTIONS.values()))
    return tuple(found)
