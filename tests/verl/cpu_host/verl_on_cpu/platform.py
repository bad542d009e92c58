"""The platform ``cpu`` in veRL's public registry. Ray is told of as many fake GPUs as there should be workers."""

from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from verl.plugin.platform import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

GIBIBYTE = 2**30


def _nothing(*args, **kwargs):
    return None


def _zero(*args, **kwargs):
    return 0


def device_module():
    """A stand-in for ``torch.cuda``: what ``torch.cpu`` has, and harmless answers to the rest that veRL asks."""
    answers = {name: getattr(torch.cpu, name) for name in torch.cpu.__all__}
    answers |= dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), _zero
    )
    answers |= dict.fromkeys(
        ("empty_cache", "ipc_collect", "set_device", "synchronize", "reset_peak_memory_stats"), _nothing
    )
    answers |= {
        "set_per_process_memory_fraction": _nothing,
        "mem_get_info": lambda *device: (16 * GIBIBYTE, 24 * GIBIBYTE),
        "get_device_name": lambda *device: "cpu",
        "get_rng_state": lambda *device: torch.get_rng_state(),
        "set_rng_state": lambda state, *device: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "is_available": lambda: True,
        "device_count": lambda: 1,
    }
    module = ModuleType("torch_cpu_as_device")
    vars(module).update(answers)
    return module


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = device_module()

    def current_device(self):
        return "cpu"  # veRL moves tensors .to(current_device())

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def is_ipc_supported(self):
        return False

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def cudart(self):
        return SimpleNamespace()

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing
