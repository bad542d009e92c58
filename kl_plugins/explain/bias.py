"""What a spec estimates on data from the current policy and on data from another policy, and why."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins.explain.formulas import row_of
from kl_plugins.spec import KLSpec
from kl_plugins.spec.options import OPTIONS
from kl_plugins.spec.target import TARGETS

NO_CLEAR_TARGET = "none"


@dataclass(frozen=True)
class Estimate:
    """The expected gradient for one kind of data: a key of ``TARGETS``, and a text with the reason."""

    target: str
    text: str


def on_policy(spec: KLSpec) -> Estimate:
    """Return the estimate for data that the current policy drew, where every importance weight is 1."""
    for row in OPTIONS.values():
        if why := row.said(row.nothing_left, spec, ""):
            return Estimate(NO_CLEAR_TARGET, f"Nothing: {why}.")
    target = _on_policy_target(spec)
    if target == NO_CLEAR_TARGET:
        return Estimate(target, f"No divergence's gradient. {why_none(spec)}")
    bends = [bend for row in OPTIONS.values() if (bend := row.said(row.on_policy, spec, ""))]
    if spec.placement == "reward":
        bends.append("this holds where the host adds up later rewards without normalising or discounting them")
    return Estimate(target, _sentence(target, bends=bends))


def off_policy(spec: KLSpec) -> Estimate:
    """Return the estimate for data from another policy: stale rollouts, or a sampler that computes differently."""
    if spec.placement != "loss":
        return Estimate(NO_CLEAR_TARGET, _score_off_policy(spec))
    if not spec.needs_behaviour:
        return _unweighted_off_policy(spec)
    if spec.target == NO_CLEAR_TARGET:
        return Estimate(NO_CLEAR_TARGET, f"No divergence's gradient. {why_none(spec)}")
    level = "token" if spec.clip is not None else spec.correction
    reweighted = "each token is" if spec.top is None else "set and bucket need no weight, the sampled remainder is"
    gains = {
        "token": f"{reweighted} reweighted; which states are visited remains the behaviour policy's choice",
        "prefix": "the product of weights up to the token corrects its state too; it decays or explodes with length",
        "sequence": "the weight of the whole response corrects everything, at the highest variance",
        "decision": "each term carries the weights of the tokens up to it, and no more",
    }
    bending = [row.name for row in OPTIONS.values() if row.bends and row.is_set(spec)]
    bends = [f"{' and '.join(bending)} bend{'s' if len(bending) == 1 else ''} it, see caveats"] if bending else []
    return Estimate(spec.target, _sentence(spec.target, gains[level], bends=bends))


def why_none(spec: KLSpec) -> str:
    """Return why a spec whose target is ``none`` estimates no divergence; empty for all other specs."""
    if spec.target != NO_CLEAR_TARGET:
        return ""
    if spec.placement == "loss":
        return _why_loss(spec)
    return _why_reward(spec) if spec.placement == "reward" else _why_advantage(spec)


def _on_policy_target(spec: KLSpec) -> str:
    if spec.placement != "loss" or row_of(spec).kind == "none":
        return spec.target
    kind = row_of(spec).kind
    if spec.horizon == "token":
        return f"{kind}_token"
    if kind == "reverse_kl":
        return "reverse_kl_sequence"
    return "other_f_sequence" if spec.future == "own" else NO_CLEAR_TARGET


def _unweighted_off_policy(spec: KLSpec) -> Estimate:
    if spec.estimator == "exact" and spec.horizon == "token" and spec.top is None:
        target = "reverse_kl_token_behaviour"
        return Estimate(target, _sentence(target, "averaging over the vocabulary needs no weight for the token itself"))
    if spec.estimator == "k1" and spec.horizon == "token":
        text = (
            "Not even zero: the gradient is minus that of KL(behaviour || policy). The reference plays no part in it; "
            "the policy is pushed away from what was sampled."
        )
    else:
        text = (
            "Biased, and no divergence's gradient: without a weight neither the tokens nor the states are the "
            f"policy's, and the coefficient is averaged under the wrong distribution. {_missing_weight(spec)}"
        )
    return Estimate(NO_CLEAR_TARGET, text)


def _missing_weight(spec: KLSpec) -> str:
    if spec.target == NO_CLEAR_TARGET:
        return "On-policy it is none either, so a weight would not help."
    if spec.horizon == "sequence":
        return "Add is:decision or is:sequence."
    if spec.estimator == "exact" and spec.top is None:
        return "Add is:prefix."
    return "Add is:token, or is:prefix for the policy's own states."


def _score_off_policy(spec: KLSpec) -> str:
    frozen = "the log-ratios are those of rollout time, frozen over the batch's updates"
    if spec.placement == "advantage" and spec.horizon == "token":
        text = f"Biased: the host's ratio reweights each token, but {frozen}."
    else:
        text = f"Biased: the host's ratio reweights one token and not the later ones its score counts, and {frozen}."
    return text + " Small while the policy stays close to the one that sampled."


def _why_loss(spec: KLSpec) -> str:
    row = row_of(spec)
    if spec.estimator == "k1":
        if spec.horizon == "token":
            return (
                "The coefficient of k1 is 1, and E[grad log policy] = 0 whatever the reference is: on average nothing "
                "is regularised, only noise is added. k1 is right as a score: k1@reward or k1@advantage."
            )
        return (
            "The own term of k1 is 1 and has zero expectation, so only the future terms are left: the sequence "
            "gradient without the token-local part. k2 has the right own term: k2@loss with the same options."
        )
    if row.kind == "none":
        return (
            f"The registered row {spec.estimator!r} does not say which divergence its coefficient is the gradient of."
        )
    if row.kind == "reverse_kl" or spec.future == "own":
        level = "clip" if spec.clip is not None else f"is:{spec.correction}"
        given = "those up to token t" if spec.correction == "prefix" else "that of token t alone"
        return (
            f"A future term of token j > t needs the weights of all tokens up to j; {level} gives it {given}. "
            f"On-policy the target is {_on_policy_target(spec)}; is:decision and is:sequence keep it off-policy."
        )
    own = "the forward KL" if row.kind == "forward_kl" else "another f-divergence"
    reason = (
        f"The own term is that of {own}, the future terms are the reverse KL's: the sum is the gradient of neither."
    )
    if row.kind == "forward_kl":
        reason += " The forward KL of whole sequences would need the reference's own states."
    return reason


def _why_reward(spec: KLSpec) -> str:
    found = {
        "k2": "the gradient of the expected sum of k2 minus the token-local reverse-KL gradient, which vanishes to "
        "first order at the reference: no force where the policy is close",
        "k3": _reverse_minus_forward("reverse-KL gradient of sequences"),
        "k3+": _reverse_minus_forward("reverse-KL gradient of sequences"),
    }.get(
        spec.estimator,
        "the gradient of the expected sum of its values without the part that flows through the values themselves",
    )
    return f"A score is not differentiated. What results is {found}. Only the value of k1 is its own score: k1@reward."


def _why_advantage(spec: KLSpec) -> str:
    found = "its value k_t stands where its coefficient belongs, so the part that flows through the value is missing"
    if spec.estimator in ("k3", "k3+"):
        reverse = (
            "reverse-KL gradient of sequences" if spec.horizon == "sequence" else "token-local reverse-KL gradient"
        )
        found = f"what results is {_reverse_minus_forward(reverse)}"
    better = "k1@advantage/future:k3 uses k3 where it is right" if found.startswith("what") else "use k1@advantage"
    return f"A score is not differentiated: {found}. k1 is right as own term: {better}."


def _reverse_minus_forward(reverse: str) -> str:
    return (
        f"the {reverse} minus the token-local forward-KL gradient. Reverse minus forward vanishes to first order at "
        "the reference and is unbounded below: no force where the policy is close, collapse where it is far"
    )


def _sentence(target: str, *remarks: str, bends: list[str] | None = None) -> str:
    unbiased = "Biased" if bends else "Unbiased"
    return "; ".join([f"{unbiased} for the {TARGETS[target]}", *remarks, *(bends or [])]) + "."
