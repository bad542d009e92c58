"""A stand-in for ``torch.cuda``: what ``torch.cpu`` has, and harmless answers to the rest that veRL asks."""

from types import ModuleType

import torch

GIBIBYTE = 2**30


def _nothing(*args, **kwargs):
    return None


def _zero(*args, **kwargs):
    return 0


def device_module():
    """The module."""
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
