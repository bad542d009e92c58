"""Functions that run inside OpenRLHF's actors; they travel by value."""


def state(actor):
    """Master weights, and the gradient where one optimizer step was made; every rank has to be asked."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = actor.actor.model
    named = dict(engine.module.named_parameters())
    parameters = {name: safe_get_full_fp32_param(value).clone() for name, value in named.items()}
    if engine.global_steps != 1:
        return parameters, None
    # DeepSpeed links parameters to their optimizer state after the first group's first step, before others have one.
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    # It drops gradients after the step; Adam's first moment after its first step is (1 - beta) times them.
    rest = 1 - actor.actor_optim.param_groups[0]["betas"][0]
    return parameters, {name: safe_get_full_optimizer_state(value, "exp_avg") / rest for name, value in named.items()}


def name_reference(actor, path):
    """Let a worker take its reference from where the harness took that of the reference actor: for ``exact@loss``."""
    actor.trainer.args.actor.model_name_or_path = path


def imported(actor):
    """Names of the modules of kl-plugins in the process."""
    import sys

    return sorted(name for name in sys.modules if name.startswith("kl_plugins"))


def end(actor):
    """Die as an actor does that is out of memory."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def node_id(actor):
    """Ray's id of the node."""
    import ray

    return ray.get_runtime_context().get_node_id()


def flat(actor):
    """Master weights and Adam's first moment, each flattened, and Adam's first beta; every rank has to be asked."""
    import contextlib

    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = actor.actor.model
    weights = [safe_get_full_fp32_param(value).clone().flatten() for value in engine.module.parameters()]
    moments = [torch.zeros_like(value) for value in weights]
    if engine.global_steps:
        if engine.global_steps == 1:  # see `state`
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        parameters = engine.module.parameters()
        with contextlib.suppress(ValueError):  # DeepSpeed skips a step that is not finite: there are none
            moments = [safe_get_full_optimizer_state(value, "exp_avg").clone().flatten() for value in parameters]
    return torch.cat(weights), torch.cat(moments), actor.actor_optim.param_groups[0]["betas"][0]


def spoil_logits(actor, rank, token, value):
    """Put a value into one logit of the next training step on one rank: that of a response token in its state.

    Args:
        actor: a ``PolicyModelActor``.
        rank: whose model it happens in.
        token: which response token of the first response that has so many.
        value: NaN or an infinity.
    """
    import torch

    if actor._rank != rank:
        return
    masks, policy = [], actor.actor

    def before(module, given):
        masks[:] = [given[1]]

    def after(module, given, kwargs, output):
        if not torch.is_grad_enabled():
            return
        for hook in hooks:
            hook.remove()
        mask = masks[0]
        row = int((mask.sum(-1) > token).nonzero()[0])
        position = int(mask[row].nonzero()[token])
        logits = output["logits"].clone()
        logits[row, position, given[0][row, position + 1]] = value
        output["logits"] = logits

    hooks = [
        policy.register_forward_pre_hook(before),
        policy.model.module.register_forward_hook(after, with_kwargs=True),
    ]


def with_arguments(actor, args):
    """Give a worker's trainer other arguments, and with them another session; False where there is no trainer."""
    if not hasattr(actor, "trainer"):
        return False
    actor.trainer.args = args
    vars(actor.trainer).pop("_kl_plugins", None)
    return True


def step_alone(actor):
    """Let the trainer step by DeepSpeed's engine alone, as a strategy that is not OpenRLHF's own may do."""
    actor.trainer.strategy.optimizer_step = lambda optimizer, model, *_, **__: model.model.step()


def replace_kl(actor, how):
    """Change what OpenRLHF's training step calls for its KL, after the receipts were given.

    Args:
        actor: a ``PolicyModelActor``.
        how: ``never`` computes a KL without the hook, ``twice`` calls the hook twice, ``restore`` puts the hook back.
    """
    from openrlhf.trainer.ray import ppo_actor

    if not hasattr(actor, "hooked_kl"):
        actor.hooked_kl = ppo_actor.compute_approx_kl
    hooked = actor.hooked_kl

    def never(log_probs, log_probs_base, kl_estimator="k1", **others):
        return log_probs - log_probs_base

    def twice(*args, **kwargs):
        hooked(*args, **kwargs)
        return hooked(*args, **kwargs)

    ppo_actor.compute_approx_kl = {"never": never, "twice": twice, "restore": hooked}[how]
