"""The CPU where OpenRLHF asks for its GPU."""


class Device(str):
    """``cpu`` to whoever moves a tensor, ``0`` to the replay buffer, which writes ``cuda:{...}`` and never uses it."""

    def __format__(self, spec):
        return "0"


CPU = Device("cpu")


def cuda_answers_for_the_cpu(cuda):
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "current_stream", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)  # one object per name: torch.compile keeps a table of them


def mesh_on_the_cpu(module):
    original = module.init_device_mesh

    def init_device_mesh(device_type, *args, **kwargs):
        return original("cpu", *args, **kwargs)

    module.init_device_mesh = init_device_mesh
