"""Functions that run inside veRL's workers; they travel by value."""


def state(process):
    """Gradient and parameters of the whole model, by name; every rank has to be asked."""

    def full(tensor):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.detach().clone()

    named = dict(process.engine.module.named_parameters())
    # veRL drops gradients after the step; Adam's first moment, after its first step, is a tenth of the gradient.
    moments = process.engine.optimizer.state
    gradient = {name: full(moments[value]["exp_avg"]) * 10 for name, value in named.items()}
    return gradient, {name: full(value) for name, value in named.items()}


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


def add_reference(process, path):
    """Give a training worker a reference model beside its own, as veRL's hybrid worker has one."""
    import copy
    import dataclasses

    from verl.workers.config import HFModelConfig
    from verl.workers.engine_workers import TrainingWorker

    model = HFModelConfig(
        path=path,
        use_remove_padding=process.model_config.use_remove_padding,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    process.ref = TrainingWorker(config=dataclasses.replace(copy.deepcopy(process.config), model_config=model))
    process.ref.reset()
