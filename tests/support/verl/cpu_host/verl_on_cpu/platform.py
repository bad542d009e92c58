"""The platform ``cpu`` in veRL's public registry. Ray is told of as many fake GPUs as there should be workers."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from verl.plugin.platform import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_on_cpu.device import device_module


def _nothing(*args, **kwargs):
    return None


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
