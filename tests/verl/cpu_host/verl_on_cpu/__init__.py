"""veRL on a machine without accelerator: a CPU platform, a transformers rollout engine, and a few shims.

For tests only. veRL imports it in every process through ``VERL_USE_EXTERNAL_MODULES``; it needs ``VERL_PLATFORM=cpu``.
"""

import verl_on_cpu.platform
import verl_on_cpu.rollout
import verl_on_cpu.shims
import verl_on_cpu.vllm

verl_on_cpu.shims.install()
verl_on_cpu.vllm.install()
verl_on_cpu.rollout.register()
