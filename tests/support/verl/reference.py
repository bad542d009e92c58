"""What the workers should have computed: the core called by hand on the same tensors."""

from kl_plugins import KLSpec, kl_term
from tests.support.verl.workers import BETA, policy_log_probs, policy_logits


def by_hand(model, batch, text, mean="token", exact=None, remainder=None):
    """Aggregated value, gradient of beta times the spec's term, and metrics, from the core alone.

    veRL divides a mean over tokens by all response tokens, those that its rejection sampling dropped included.
    """
    logp = batch.padded(policy_log_probs(model, batch.prompts, batch.responses))
    old, rollout, ref = (
        batch.padded(batch.log_probs[key]) for key in ("old_log_probs", "rollout_log_probs", "ref_log_prob")
    )
    mask = batch.padded(batch.extra.get("response_mask", batch.masks)).bool()
    term = kl_term(
        KLSpec.parse(text), logp, ref, mask, old_logp=old, sampler_logp=rollout, exact=exact, remainder=remainder
    )
    kept = term.loss.masked_fill(~mask, 0)
    if mean == "token":
        value = kept.sum() / batch.padded(batch.masks).sum()
    else:
        value = (kept.sum(-1) / mask.sum(-1)).mean()
    model.zero_grad()
    (BETA * value).backward()
    return value.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, term.metrics


def distance(ours, theirs):
    """Relative distance of two gradients by name."""
    assert ours.keys() == theirs.keys() != set()
    gap = sum((ours[name] - theirs[name]).square().sum() for name in ours)
    return (gap / sum(value.square().sum() for value in theirs.values())).sqrt().item()


def difference(one, other):
    """Difference of two gradients, by name."""
    return {name: one[name] - other[name] for name in one}


def exact_by_hand(models, batch):
    """(B, T) KL of the states from both models' whole softmax."""
    found = []
    for policy, reference in zip(
        *(policy_logits(model, batch.prompts, batch.responses) for model in models[:2]), strict=True
    ):
        logp, ref_logp = policy.double().log_softmax(-1), reference.detach().double().log_softmax(-1)
        found.append((logp.exp() * (logp - ref_logp)).sum(-1).float())
    return batch.padded(found)
