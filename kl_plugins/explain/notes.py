"""Notes on common misunderstandings about a spec; ``explain`` shows them first."""

from __future__ import annotations

from kl_plugins.explain.formulas import row_of
from kl_plugins.explain.stability import stability
from kl_plugins.spec import PRESETS, KLSpec
from kl_plugins.spec.observation import Observation

_DIVERGENCES = {
    "abs": "twice the total variation, sum_a |policy(a) - reference(a)|",
    "jeffreys": "the Jeffreys divergence, KL(policy || reference) + KL(reference || policy)",
    "jsd": "the Jensen-Shannon divergence",
    "hellinger": "the squared Hellinger distance, sum_a (sqrt policy(a) - sqrt reference(a))^2",
    "chi2": "half the chi-squared divergence of the reference from the policy",
}

WHY_DEFAULT = (
    "Why this is the default: k2's coefficient is the reverse KL's, and the token weight corrects it for stale or "
    "mismatched samples, up to the states visited. The floor changes nothing where every weight is at least 0.5. Below "
    "that it keeps the pull on tokens that the policy has almost dropped, which would fade under the plain weight; the "
    "price is a bias of the gradient at these tokens. In exact enumeration the weighted k2 has the lowest error at "
    "realistic sample sizes: the sequence gradient is the complete one, but the variance of its future-KL term costs "
    "more than the term is worth, so that term is opt-in (preset sequence)."
)

WHICH_ONE = (
    "Which one to take: three specs estimate the reverse KL's gradient in a loss. k2@loss needs only log-probs and is "
    "the cheapest; it has the noise of one sampled token per state. Take exact@loss/top where that noise matters, as "
    "on stale data: its only noise is that of the tokens outside the reference's most probable ones, most of which "
    "further tokens that the reference draws take away. Of the reference it needs 2 k + 3 m + 2 numbers per token "
    "for k most probable tokens and m draws, which the pass that gives its log-probs gives as well. Take "
    "exact@loss if the reference's logits are beside the policy's: it has no token noise."
)


def observing(observation: Observation) -> str:
    """Return what a KL setting with ``observe`` does.

    Args:
        observation: the setting.
    """
    own = "the framework's own KL" + (f" ({observation.native})" if observation.native else "")
    spec = "the spec that has the gradient of that KL" if observation.spec is None else str(observation.spec)
    probe = "" if observation.probe is None else f" Every {observation.probe} optimizer steps, a probe looks deeper."
    return (
        f"observe changes nothing: the run trains with {own} exactly as it does without kl-plugins, and {spec} is "
        f"measured on the same tokens and logged as kl/ metrics.{probe} Everything below is about {spec}, if it were "
        "applied. In veRL and OpenRLHF, the estimator's own word goes before observe: k3/observe."
    )


def notes(spec: KLSpec) -> tuple[str, ...]:
    """Return statements on this estimator in this placement, the most important one first."""
    found = [WHY_DEFAULT] if spec == KLSpec.parse(PRESETS["default"]) else []
    kind = row_of(spec).kind
    if spec.placement == "loss" and kind == "forward_kl" and spec.horizon == "token":
        found.append(
            f"{spec.estimator} as a loss gives the forward KL's gradient, that of KL(reference || policy), exactly: "
            "E[(1 - delta) grad log policy] = -E_reference[grad log policy]."
        )
        if spec.estimator == "k3":
            found[-1] += (
                " It is not an approximation of the reverse KL's gradient, although the value of k3 estimates the "
                "reverse KL without bias."
            )
    if spec.placement == "loss" and spec.estimator == "k2":
        found.append(
            "As a value k2 is a biased estimate of the reverse KL; as a loss its gradient is the reverse KL's. "
            "The gradient is what trains."
        )
    if spec.placement == "loss" and spec.estimator == "k3+":
        found.append(
            "The value shown is k3, the gradient is k2's: sample by sample that of k3 times the live policy/behaviour."
        )
    if spec.placement == "reward" and spec.estimator == "k1":
        found.append(
            "k1 in the reward equals k2 as a loss where a response is one action; over tokens the return adds the "
            "future-KL term that k2@loss leaves out. Where rewards are divided by a group's standard deviation, a "
            "group whose rewards tie gets a KL force that does not depend on beta; k1@advantage avoids that."
        )
    if kind == "other_f" and spec.target.startswith("other_f"):
        found.append(f"The divergence is {_divergence(spec)}.")
    if spec.top is not None:
        found.append(
            f"Of the reference it needs the {spec.top} most probable tokens of every state, their log-probs, and the "
            "probability that they leave, which the pass that gives its log-probs can give as well: what a host keeps "
            "or recomputes for that is in its receipt."
        )
        if spec.draws is None:
            found.append(
                "The value is the KL over the set and one bucket for all other tokens: never negative, and a lower "
                "bound of the KL. What happens inside the bucket enters the gradient by the drawn token, without bias."
            )
        else:
            found.append(
                f"In the same pass the reference draws {spec.draws} more tokens from its tail. What happens inside the "
                "bucket is estimated from them and the drawn token together, without bias. The value includes the "
                "draws' part, so a single one can be negative."
            )
    elif spec.needs_exact:
        found.append(
            "It needs the reference's logits or hidden states of every state, not only its log-probs: what a host keeps"
            " or recomputes for that is in its receipt."
        )
    if spec.placement == "loss" and spec.estimator in ("exact", "k2", "k3+"):
        found.append(WHICH_ONE)
    if said := stability(spec):
        found.append(said)
    return tuple(found)


def _divergence(spec: KLSpec) -> str:
    named = spec.estimator.removeprefix("alpha-")
    if named != spec.estimator:
        return f"the alpha-divergence with a = {named}: a = 1 is the forward KL, a towards 0 the reverse KL"
    return _DIVERGENCES.get(spec.estimator, f"that of the registered row {spec.estimator!r}")
