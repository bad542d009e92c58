"""Places where veRL assumes an accelerator and offers no setting."""

import functools

import torch.distributed
import torch.distributed.fsdp
import wrapt
from transformers import AutoModelForTokenClassification


def install():
    _one_backend_for_one_device()
    _no_pinned_memory()
    _critic_without_flash_attention()
    wrapt.register_post_import_hook(_padding_without_flash_attention, "verl.utils.attention_utils")
    wrapt.register_post_import_hook(_saved_models_are_copies, "verl.utils.fsdp_utils")


def _one_backend_for_one_device():
    # veRL asks for "cpu:gloo,<device>:gloo", which names the CPU twice here.
    original = torch.distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def _no_pinned_memory():
    # The reference model is offloaded to pinned memory, which needs an accelerator's driver.
    class Unpinned(torch.distributed.fsdp.CPUOffloadPolicy):
        def __init__(self, pin_memory=False):
            super().__init__(pin_memory=False)

    torch.distributed.fsdp.CPUOffloadPolicy = Unpinned


def _critic_without_flash_attention():
    # The critic's attention is fixed in veRL's source.
    original = AutoModelForTokenClassification.from_pretrained

    def from_pretrained(*args, **kwargs):
        if kwargs.get("attn_implementation") == "flash_attention_2":
            kwargs["attn_implementation"] = "sdpa"
        return original(*args, **kwargs)

    AutoModelForTokenClassification.from_pretrained = from_pretrained


def _padding_without_flash_attention(module):
    # veRL 0.9.1 falls back by itself; before, it has the same functions in plain PyTorch for another accelerator.
    def functions():
        from verl.utils.npu_flash_attn_utils import index_first_axis, pad_input, rearrange, unpad_input

        return index_first_axis, pad_input, rearrange, unpad_input

    if not hasattr(module, "_fallback_pad_input"):
        module._get_attention_functions = functions


def _saved_models_are_copies(module):
    # Asynchronous trainers save the weights of the actor and put them back. A tensor that is moved from the CPU to the
    # CPU is no copy, so what was saved would change with the weights.
    original = getattr(module, "fsdp2_sharded_save_to_cpu", None)
    if original is None:
        return

    def fsdp2_sharded_save_to_cpu(model):
        state, spec = original(model)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    module.fsdp2_sharded_save_to_cpu = fsdp2_sharded_save_to_cpu
