"""The gradient that a spec estimates in expectation, and the caveats of the estimate.

The results were found by exact enumeration (``tests/oracle``), and not derived by reading the formulas.
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

    The data are assumed to come from the behaviour policy, and with ``is:none`` from the current policy.
    """
    if spec.placement == "reward":
        # A score in the reward acts as reward-to-go. Only for k1 is the result the gradient of a divergence.
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
        return "none"  # A future term needs a weight over all of its tokens.
    if row.kind == "reverse_kl":  # This holds for every future term, because each has mean KL_j.
        return "reverse_kl_sequence"
    return "other_f_sequence" if spec.future == "own" else "none"


def caveats_with_source(spec: KLSpec, source: str) -> tuple[str, ...]:
    """Return the spec's caveats, given the host's choice of the behaviour policy's log-probs.

    Args:
        spec: a parsed spec.
        source: ``old`` or ``current`` for the trainer's own log-probs, ``sampler``, or ``unused``.
    """
    by_old = spec.needs_behaviour and spec.behaviour is None and source in ("old", "current")
    return (*((OLD_CAVEAT,) if by_old else ()), *spec.caveats)


def caveats_of(spec: KLSpec) -> tuple[str, ...]:
    """Return the reasons why the estimate can deviate from the target, one sentence each."""
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
