"""Functions that run inside veRL's workers; they travel by value."""


def weights(process):
    """Parameters of the whole model, by name; every rank has to be asked."""
    return {name: _full(value) for name, value in process.engine.module.named_parameters()}


def decay_to_zero(process, steps):
    """Let the learning rate fall linearly to 0, for which veRL has no name; its engine steps the schedule."""
    from torch.optim.lr_scheduler import LambdaLR

    process.engine.lr_scheduler = LambdaLR(process.engine.optimizer, lambda step: max(0.0, 1 - step / steps))


def cpu_seconds(process):
    """Processor time of the process."""
    import time

    return time.process_time()


def state(process):
    """Gradient and parameters of the whole model, by name; every rank has to be asked."""
    named = dict(process.engine.module.named_parameters())
    # veRL drops gradients after the step; Adam's first moment, after its first step, is a tenth of the gradient.
    moments = process.engine.optimizer.state
    gradient = {name: _full(moments[value]["exp_avg"]) * 10 for name, value in named.items()}
    return gradient, {name: _full(value) for name, value in named.items()}


def freeze(process):
    """Let no update change the weights."""
    set_rate(process, 0.0)


def set_rate(process, rate):
    """Change the learning rate."""
    for group in process.engine.optimizer.param_groups:
        group["lr"] = rate


def count_forwards(process):
    """From now on count the forward passes of the process's model, the reference's where it holds one alone."""
    process.forwards = 0

    def count(module, args, output):
        process.forwards += 1

    holder = getattr(process, "ref", None) or process
    process.counting = holder.engine.module.register_forward_hook(count)


def counted_forwards(process):
    """Stop counting, and give the number."""
    process.counting.remove()
    return process.forwards


def train_without_steps(process, data):
    """Train with an engine that computes losses and never steps, and give the text of the error."""
    engine = process.engine
    engine.train_batch = lambda batch, loss_function: engine.forward_backward_batch(batch, loss_function)
    try:
        process.train_mini_batch(data)
    except RuntimeError as error:
        return str(error)
    finally:
        del engine.train_batch


def record_gradients(process):
    """From now on keep the gradients of the last optimizer step that was made."""
    parameters = dict(process.engine.module.named_parameters())
    process.recorded = {}

    def keep(optimizer, args, kwargs):
        gradients = {name: value.grad for name, value in parameters.items() if value.requires_grad}
        process.recorded = {name: gradient.detach().clone() for name, gradient in gradients.items()}

    process.engine.optimizer.register_step_pre_hook(keep)


def recorded_gradients(process):
    """Those gradients, by name; every rank has to be asked."""
    return {name: _full(value) for name, value in process.recorded.items()}


def set_coefficient(process, value):
    """Change the coefficient of the KL loss, as a program does that controls it."""
    object.__setattr__(process.loss_fn.keywords["config"], "kl_loss_coef", value)  # veRL's dataclasses are frozen


def break_policy(process, rank, position, token, value):
    """Put a value into the logits of one rank's next forward pass, first sequence; every rank has to be asked."""

    def once(module, args, output):
        handle.remove()
        output = output.clone()  # on all ranks: FSDP hangs its hooks on what modules return
        if process.rank == rank:
            output[0, position, token] = value
        return output

    handle = process.engine.module.lm_head.register_forward_hook(once)


def imported(process):
    """Names of the modules of kl-plugins in the process."""
    import sys

    return sorted(name for name in sys.modules if name.startswith("kl_plugins"))


def end(process):
    """Die as a worker does that is out of memory."""
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def node_id(process):
    """Ray's id of the node."""
    import ray

    return ray.get_runtime_context().get_node_id()


def start_from(process, path):
    """Let a training worker load another model at its next reset."""
    process.model_config = process.engine.model_config = _model(process, path)
    process.model_config.model_type = process.config.model_type


def add_reference(process, path):
    """Give a training worker a reference model beside its own, as veRL's hybrid worker has one."""
    import copy
    import dataclasses

    from verl.workers.engine_workers import TrainingWorker

    config = dataclasses.replace(copy.deepcopy(process.config), model_config=_model(process, path))
    process.ref = TrainingWorker(config=config)
    process.ref.reset()


def score(process, data):
    """Score a batch under the reference model that :func:`add_reference` gave."""
    return process.ref.infer_batch(data)


def _model(process, path):
    from verl.workers.config import HFModelConfig

    return HFModelConfig(
        path=path,
        use_remove_padding=process.model_config.use_remove_padding,
        enable_gradient_checkpointing=False,
        override_config=dict(process.model_config.override_config),
    )


def _full(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def replace_kl(process, how):
    """Change what veRL's PPO loss calls for its KL, after the receipts were given.

    Args:
        process: a training worker.
        how: ``never`` computes a KL without the hook, ``twice`` calls the hook twice, ``restore`` puts the hook back.
    """
    from verl.workers.utils import losses

    if not hasattr(process, "hooked_kl"):
        process.hooked_kl = losses.kl_penalty
    hooked = process.hooked_kl

    def never(logprob, ref_logprob, kl_penalty):
        return logprob - ref_logprob

    def twice(logprob, ref_logprob, kl_penalty):
        hooked(logprob, ref_logprob, kl_penalty)
        return hooked(logprob, ref_logprob, kl_penalty)

    losses.kl_penalty = {"never": never, "twice": twice, "restore": hooked}[how]


def train_outside(process, data):
    """Train with veRL's own ``train_batch``, past the hook around it, and give the text of the error."""
    import types

    method = type(process).train_batch
    while type(method).__name__ != "Hook":  # Ray puts a function of its own around the methods of its actors
        method = method.__wrapped__
    process.train_batch = types.MethodType(method.__wrapped__, process)
    try:
        process.train_mini_batch(data)
    except RuntimeError as error:
        return str(error)
    finally:
        del process.train_batch


def attend(process, how):
    """From now on compute attention by another of transformers' functions."""
    process.engine.module.config._attn_implementation = how
