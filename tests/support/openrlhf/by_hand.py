"""What the hooks should give, computed without them; the first part runs inside OpenRLHF's policy workers, by value."""


def losses(actor, cases, experience, beta):
    """Gradients of OpenRLHF's training step under each spec, and of the same loss put together by hand.

    The host's own step runs up to its ``backward``, which is where this function takes the loss; its gradient is that
    with respect to the log-probs of the policy.

    Args:
        actor: a ``PolicyModelActor``.
        cases: spec and whether the sampler's log-probs should be the behaviour policy's.
        experience: one micro-batch.
        beta: the host's coefficient.

    Returns:
        Per case: whether the two gradients are equal in every bit, the hand's gradient, and two of the step's metrics.
    """
    import torch
    from openrlhf.models import aggregate_loss
    from openrlhf.utils.loss_utils import get_loss_batch_info

    from kl_plugins import KLSpec, kl_term

    trainer, found = actor.trainer, []
    strategy, mask = trainer.strategy, experience.action_mask
    info = get_loss_batch_info(strategy, mask)
    taken, outputs = [], []
    watch = trainer.actor.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
    strategy.backward = lambda loss, *_: taken.append(loss)
    strategy.optimizer_step = lambda *_, **__: None

    try:
        for text, sampler in cases:
            spec = KLSpec.parse(text)
            trainer.args.algo.kl.estimator = text
            vars(trainer).pop("_kl_plugins", None)
            from kl_plugins.patches.openrlhf.worker import receipt

            receipt(actor, str(spec), "sampler" if sampler else "old" if spec.needs_behaviour else "unused")
            metrics = trainer.training_step(experience, beta, 0, info)["metrics"]
            logp = outputs.pop()
            (hooked,) = torch.autograd.grad(taken.pop(), logp, retain_graph=True)
            policy_loss = trainer.actor_loss_fn(
                logp,
                experience.action_log_probs,
                experience.advantages,
                action_mask=mask,
                rollout_log_probs=experience.rollout_log_probs,
                **info,
            )[0]
            term = kl_term(
                spec,
                logp,
                experience.base_action_log_probs,
                mask.bool(),
                old_logp=None if sampler else experience.action_log_probs,
                sampler_logp=experience.rollout_log_probs if sampler else None,
            )
            (expected,) = torch.autograd.grad(policy_loss + aggregate_loss(term.loss, mask, **info) * beta, logp)
            shown = {key: float(metrics[key].mean()) for key in ("kl", "logprobs_diff")}
            found.append((torch.equal(hooked, expected), expected, shown))
    finally:
        watch.remove()
        del strategy.backward, strategy.optimizer_step
    return found


def name_reference(actor, path):
    """Let a worker take its reference from where the harness took that of the reference actor."""
    actor.trainer.args.actor.model_name_or_path = path


def exact_losses(actor, cases, experience, beta, path):
    """Gradients of OpenRLHF's training step with respect to the logits, and those of the whole softmax by hand.

    Args:
        actor: a ``PolicyModelActor``.
        cases: specs.
        experience: one micro-batch; its advantages are put to zero, so that all there is is the KL.
        beta: the host's coefficient.
        path: of the reference model.

    Returns:
        Per case: relative distance of the two gradients, the size of the hand's, and the mean KL.
    """
    import torch
    from openrlhf.models import aggregate_loss
    from openrlhf.utils.loss_utils import get_loss_batch_info
    from transformers import AutoModelForCausalLM

    from kl_plugins import KLSpec, kl_term
    from kl_plugins.patches.openrlhf.worker import receipt

    trainer, strategy, mask, found = actor.trainer, actor.trainer.strategy, experience.action_mask.bool(), []
    experience.advantages = torch.zeros_like(experience.advantages)
    policy = trainer.actor.model.module
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=policy.dtype)
    position = (experience.attention_mask.long().cumsum(-1) - 1).masked_fill(experience.attention_mask == 0, 1)
    given = {"attention_mask": experience.attention_mask, "position_ids": position}
    with torch.no_grad():
        ref_logits = reference(experience.sequences, **given).logits
    info = get_loss_batch_info(strategy, experience.action_mask)
    states, labels = slice(-mask.shape[1] - 1, -1), experience.sequences[:, -mask.shape[1] :].unsqueeze(-1)
    taken, outputs = [], []
    watch = trainer.actor.register_forward_hook(lambda module, given, output: outputs.append(output[1]["logits"]))
    strategy.backward = lambda loss, *_: taken.append(loss)
    strategy.optimizer_step = lambda *_, **__: None
    try:
        for text in cases:
            spec = KLSpec.parse(text)
            trainer.args.algo.kl.estimator = text
            vars(trainer).pop("_kl_plugins", None)
            receipt(actor, str(spec), "old" if spec.needs_behaviour else "unused")
            trainer.training_step(experience, beta, 0, info)
            logits = outputs.pop(0)
            outputs.clear()  # the reference's, under LoRA
            (hooked,) = torch.autograd.grad(taken.pop(), logits, retain_graph=True)
            logp, ref_logp = (part[:, states].double().log_softmax(-1) for part in (logits, ref_logits))
            kl = (logp.exp() * (logp - ref_logp)).sum(-1).masked_fill(~mask, 0.0)
            term = kl_term(
                spec,
                logp.gather(-1, labels).squeeze(-1),
                experience.base_action_log_probs.double(),
                mask,
                old_logp=experience.action_log_probs.double(),
                exact=kl,
            )
            (expected,) = torch.autograd.grad(aggregate_loss(term.loss, mask.double(), **info) * beta, logits)
            gap = float((hooked - expected).norm() / expected.norm())
            found.append((gap, float(expected.norm()), float(kl.sum() / mask.sum())))
    finally:
        watch.remove()
        del strategy.backward, strategy.optimizer_step
    return found


def top_losses(actor, cases, experience, beta, path, key):
    """Gradients of OpenRLHF's training step under ``top:`` with respect to the logits, and those by hand.

    By hand is plain torch in float64, from the logits of policy and reference: the sum over the kept tokens and the
    bucket, and the remainder, which is a coefficient on the log-prob of the drawn token.

    Args:
        actor: a ``PolicyModelActor``.
        cases: specs; the weights of ``exact@`` with ``is:token`` or without a weight are computed by hand as well.
        experience: one micro-batch; its advantages are put to zero, so that all there is is the KL.
        beta: the host's coefficient.
        path: of the reference model.
        key: name of the numbers in the micro-batch's ``info``.

    Returns:
        Per case: relative distance of the two gradients, the size of the hand's, the mean of sum and bucket, the share
        of drawn tokens in the bucket, how far their importance weights are from 1, and by how much the reference's mass
        on the kept tokens is below that of its most probable ones.
    """
    import numpy as np
    import torch
    from openrlhf.models import aggregate_loss
    from openrlhf.utils.loss_utils import get_loss_batch_info
    from transformers import AutoModelForCausalLM

    from kl_plugins import KLSpec, kl_term
    from kl_plugins.patches.openrlhf.worker import receipt

    trainer, strategy, mask, found = actor.trainer, actor.trainer.strategy, experience.action_mask.bool(), []
    experience.advantages = torch.zeros_like(experience.advantages)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.bfloat16)
    position = (experience.attention_mask.long().cumsum(-1) - 1).masked_fill(experience.attention_mask == 0, 1)
    given = {"attention_mask": experience.attention_mask, "position_ids": position}
    with torch.no_grad():
        ref_logits = reference(experience.sequences, **given).logits.float()
    info, numbers = get_loss_batch_info(strategy, experience.action_mask), experience.info[key]
    states, labels = slice(-mask.shape[1] - 1, -1), experience.sequences[:, -mask.shape[1] :].unsqueeze(-1)
    taken, outputs = [], []
    watch = trainer.actor.register_forward_hook(lambda module, given, output: outputs.append(output[1]["logits"]))
    strategy.backward = lambda loss, *_: taken.append(loss)
    strategy.optimizer_step = lambda *_, **__: None
    try:
        for text in cases:
            spec = KLSpec.parse(text)
            trainer.args.algo.kl.estimator = text
            vars(trainer).pop("_kl_plugins", None)
            receipt(actor, str(spec), "old" if spec.needs_behaviour else "unused")
            experience.info = {**experience.info, key: numbers}
            trainer.training_step(experience, beta, 0, info)
            (logits,) = outputs
            outputs.clear()
            (hooked,) = torch.autograd.grad(taken.pop(), logits, retain_graph=True)
            logp, ref_logp = (part[:, states].double().log_softmax(-1) for part in (logits, ref_logits))
            ids = torch.zeros(*mask.shape, spec.top, dtype=torch.long)
            ids[mask] = torch.from_numpy(np.concatenate(numbers))[:, : spec.top].long()
            kept = torch.zeros_like(logp, dtype=torch.bool).scatter_(-1, ids, True)
            tail, ref_tail = (part.masked_fill(kept, -torch.inf).logsumexp(-1) for part in (logp, ref_logp))
            within = (logp.exp() * (logp - ref_logp)).masked_fill(~kept, 0.0).sum(-1)
            kl = (within + tail.exp() * (tail - ref_tail)).masked_fill(~mask, 0.0)
            drawn, ref_drawn = (part.gather(-1, labels).squeeze(-1) for part in (logp, ref_logp))
            outside = ~kept.gather(-1, labels).squeeze(-1) & mask
            remainder = (drawn - ref_drawn - (tail - ref_tail)).detach().masked_fill(~outside, 0.0)
            old = experience.action_log_probs.double()
            weight = (drawn - old).detach().exp().masked_fill(~mask, 1.0)
            if spec.draws is not None:
                sides = torch.from_numpy(np.concatenate(numbers)), logits[:, states][mask], labels[..., 0][mask]
                kl, remainder = _with_draws(*sides, ref_drawn[mask], mask, spec.draws)
                loss = kl + (weight if "is:token" in text else 1.0) * remainder * drawn
            elif text.startswith("exact@") and text.count("/") + ("/is:token" not in text) == 2:
                loss = kl + (weight if "is:token" in text else 1.0) * remainder * drawn
            else:
                carried = experience.base_action_log_probs.double()
                states_kl = {"exact": kl, "remainder": remainder}
                loss = kl_term(spec, drawn, carried, mask, old_logp=old, **states_kl).loss
            (expected,) = torch.autograd.grad(aggregate_loss(loss, mask.double(), **info) * beta, logits)
            best = ref_logp.topk(spec.top, -1).values.exp().sum(-1) - ref_logp.exp().masked_fill(~kept, 0.0).sum(-1)
            gap, size = float((hooked - expected).norm() / expected.norm()), float(expected.norm())
            shares = float(kl.sum() / mask.sum()), float(outside.sum() / mask.sum())
            found.append((gap, size, *shares, float((weight - 1).abs().max()), float(best[mask].max())))
    finally:
        watch.remove()
        del strategy.backward, strategy.optimizer_step
    return found


def count_passes(actor):
    """Start to count the forward passes of the actor's model, policy or reference."""
    model = actor.actor if hasattr(actor, "actor") else actor.model
    actor.passes = []
    model.register_forward_pre_hook(lambda module, given: actor.passes.append(tuple(given[0].shape)))


def passes(actor):
    """The shapes (B, L) of the passes that were counted, and whether a policy worker holds a reference."""
    session = vars(actor.trainer).get("_kl_plugins") if hasattr(actor, "trainer") else None
    return actor.passes, session is not None and session.reference is not None


def detach_plugin(actor):
    """Take kl-plugins out of the process."""
    from kl_plugins.adapters.openrlhf import detach

    detach()


def attach_plugin(actor):
    """Put kl-plugins into the process."""
    from kl_plugins.adapters.openrlhf import attach

    attach()


def controller(actor):
    """State of a worker's beta controller."""
    return dict(actor.trainer._kl_plugins.controller.state)


def pack_without_flash_attention(actor):
    """Give OpenRLHF's packing the helpers of flash-attn that transformers has in plain torch."""
    from openrlhf.models import ring_attn_utils
    from transformers import modeling_flash_attention_utils as helpers

    ring_attn_utils.index_first_axis = lambda tensor, indices: tensor[indices]
    ring_attn_utils.pad_input = helpers._pad_input
    ring_attn_utils.unpad_input = helpers._unpad_input


def move(actor, scale):
    """Move the policy away from what it was at rollout time, the same way each time."""
    import torch

    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in actor.actor.model.module.parameters():
            parameter.add_((scale * torch.randn(parameter.shape, generator=random)).to(parameter.dtype))


def token_rewards(rewards, kl, mask, beta):
    """Reward at each response's last token, minus beta times the KL of each token; nested lists."""
    rows = []
    for reward, kls, live in zip(rewards, kl, mask, strict=True):
        last = max(t for t, on in enumerate(live) if on)
        rows.append(
            [(-beta * k + (reward if t == last else 0.0)) * on for t, (k, on) in enumerate(zip(kls, live, strict=True))]
        )
    return rows


def baselined(estimator, rewards, group):
    """OpenRLHF's reward of each sequence after its group's baseline; a list."""
    found = []
    for start in range(0, len(rewards), group):
        rows = rewards[start : start + group]
        mean = sum(rows) / group
        spread = (sum((r - mean) ** 2 for r in rows) / (group - 1)) ** 0.5
        for r in rows:
            if estimator == "rloo":
                found.append(r - (sum(rows) - r) / (group - 1))
            elif estimator in ("reinforce_baseline", "dr_grpo"):
                found.append(r - mean)
            elif estimator == "group_norm":
                found.append((r - mean) / (spread + 1e-9))
            elif estimator == "flash_reinforce":
                found.append(r - sum(rewards) / len(rewards))
            else:
                found.append(r)
    return found


def advantages(estimator, rewards, kl, mask, beta, *, group, gamma, lambd, values):
    """OpenRLHF's final advantages of a whole rollout, one list per sequence.

    Args:
        estimator: the value of ``--algo.advantage.estimator``.
        rewards: of each sequence.
        kl: what is subtracted from token rewards, per unit beta.
        mask: 1 on response tokens.
        beta: coefficient.
        group: sequences per prompt.
        gamma, lambd: of the estimator.
        values: the critic's.
    """
    rows = []
    rewarded = token_rewards(baselined(estimator, rewards, group), kl, mask, beta)
    for tokens, live, value in zip(rewarded, mask, values, strict=True):
        running, row = 0.0, [0.0] * len(tokens)
        for t in reversed(range(len(tokens))):
            if estimator == "gae":
                following = value[t + 1] * live[t + 1] if t + 1 < len(tokens) else 0.0
                running = tokens[t] + gamma * following - value[t] * live[t] + gamma * lambd * running
            else:
                running = tokens[t] + (gamma if estimator == "reinforce" else 1.0) * running
            row[t] = running
        rows.append(row)
    if estimator not in ("gae", "reinforce", "reinforce_baseline"):
        return rows
    flat = [a for row, live in zip(rows, mask, strict=True) for a, on in zip(row, live, strict=True) if on]
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / len(flat)
    return [[(a - mean) / max(variance, 1e-8) ** 0.5 for a in row] for row in rows]


def _with_draws(numbers, logits, labels, ref_logp, mask, draws):
    """KL and remainder (B, A) by the core, in float64, from the numbers that the experience carries."""
    from kl_plugins import exact_kl
    from kl_plugins.adapters.top_k import unpacked

    kept = unpacked(numbers, draws=draws)
    found = exact_kl(logits.double(), None, labels, reference=kept, ref_logp=ref_logp)
    return (ref_logp.new_zeros(mask.shape).masked_scatter(mask, part) for part in (found.kl, found.remainder))
