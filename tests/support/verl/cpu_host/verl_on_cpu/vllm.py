"""veRL's own vLLM rollout on a CPU: two places that assume an accelerator, in whatever process imports them.

vLLM's engine runs in a process of its own, which imports veRL for the worker extension and with it this module.
"""

import torch
import wrapt


def install():
    wrapt.register_post_import_hook(_weights_stay_loadable, "vllm.model_executor.layers.utils")
    wrapt.register_post_import_hook(
        _received_weights_are_copies, "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer"
    )


def _weights_stay_loadable(module):
    # Prepacked for the CPU, linear weights forget how to load what veRL sends after each update.
    def keep_weights(layer, remove_weight=False):
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = keep_weights


def _received_weights_are_copies(module):
    # veRL relies on the move to a device; without one, views would keep the shared memory from being closed.
    original = module.rebuild_shared_memory

    def rebuild_shared_memory(*args, **kwargs):
        tensor, memory = original(*args, **kwargs)
        return _CopiedSlices(tensor), memory

    module.rebuild_shared_memory = rebuild_shared_memory


class _CopiedSlices:
    def __init__(self, tensor):
        self.tensor = tensor

    def __getitem__(self, part):
        return self.tensor[part].clone()
