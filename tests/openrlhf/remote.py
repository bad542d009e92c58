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
