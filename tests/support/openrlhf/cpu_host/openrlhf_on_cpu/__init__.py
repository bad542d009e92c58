"""OpenRLHF on a machine without accelerator. For tests only.

OpenRLHF has no device setting: it asks ``torch.cuda`` for its device, builds its mesh on ``cuda`` and sends weights to
vLLM by NCCL. ``device`` answers the first two for the CPU, ``weights`` does the third through a socket. DeepSpeed is
told by its own ``DS_ACCELERATOR=cpu``, and ``extensions`` keeps a killed test from locking out what it compiles. The
folder ``flash_attn`` is what OpenRLHF imports without using it here.
"""

import wrapt

from openrlhf_on_cpu import device, extensions, weights


def install():
    """Register what runs after each of the imports; imports nothing itself."""
    wrapt.register_post_import_hook(device.cuda_answers_for_the_cpu, "torch.cuda")
    wrapt.register_post_import_hook(extensions.lock_by_process, "torch.utils.cpp_extension")
    wrapt.register_post_import_hook(device.mesh_on_the_cpu, "openrlhf.utils.deepspeed.deepspeed")
    wrapt.register_post_import_hook(weights.send_by_socket, "openrlhf.utils.distributed_util")
    wrapt.register_post_import_hook(weights.load_at_once, "openrlhf.trainer.ray.vllm_worker_wrap")
