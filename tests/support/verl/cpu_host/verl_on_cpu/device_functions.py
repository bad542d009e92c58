"""veRL before 0.9 has no platforms: its device functions are replaced, wherever they were imported by name."""

import sys

import verl.utils.device
import wrapt

from verl_on_cpu.device import device_module

MODULE = device_module()
ANSWERS = {"get_torch_device": MODULE, "get_device_id": "cpu", "get_nccl_backend": "gloo", "get_resource_name": "GPU"}


def install():
    for name, answer in ANSWERS.items():
        _replace(getattr(verl.utils.device, name), name, lambda answer=answer: answer)
    wrapt.register_post_import_hook(_engines_run_anywhere, "verl.workers.engine.fsdp.transformer_impl")


def _replace(original, name, replacement):
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").partition(".")[0] == "verl" and vars(module).get(name) is original:
            setattr(module, name, replacement)


def _engines_run_anywhere(module):
    for backends in module.EngineRegistry._engines.values():
        for devices in backends.values():
            devices.setdefault("cpu", devices["cuda"])
