"""veRL on a machine without accelerator: a CPU platform, a transformers rollout engine, and a few shims.

For tests only. veRL imports it in every process through ``VERL_USE_EXTERNAL_MODULES``; it needs ``VERL_PLATFORM=cpu``.
"""

import importlib.util

import verl_on_cpu.flash_attention
import verl_on_cpu.recorder
import verl_on_cpu.rollout
import verl_on_cpu.shims
import verl_on_cpu.vllm

if importlib.util.find_spec("verl.plugin"):
    import verl_on_cpu.platform
else:
    import verl_on_cpu.device_functions

    verl_on_cpu.device_functions.install()
verl_on_cpu.shims.install()
verl_on_cpu.flash_attention.install()
verl_on_cpu.vllm.install()
verl_on_cpu.recorder.install()
verl_on_cpu.rollout.register()
