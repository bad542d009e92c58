"""The functions of the package flash-attn in plain PyTorch, which transformers then calls under their own name.

veRL's sequence parallelism works only through ``attn_implementation=flash_attention_2``: it exchanges heads for tokens
around transformers' call of these functions. Everything before and after the call is veRL's own and transformers'.
"""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention


def install():
    from transformers import PreTrainedModel, modeling_flash_attention_utils

    # Both ask for the package and for an accelerator.
    PreTrainedModel._flash_attn_can_dispatch = lambda model, *args, **kwargs: True
    modeling_flash_attention_utils._lazy_imports = lambda *args, **kwargs: (
        attention,
        attention_of_packed,
        None,
        modeling_flash_attention_utils._pad_input,
        modeling_flash_attention_utils._unpad_input,
    )


def attention(q, k, v, softmax_scale=None, causal=False):
    """Attention of (batch, tokens, heads, size); keys and values may have fewer heads."""
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    found = scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return found.transpose(1, 2)


def attention_of_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False):
    """Attention of packed (tokens, heads, size), within each sequence; the arguments are those of flash-attn."""
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    parts = [
        attention(q[None, start:end], k[None, first:last], v[None, first:last], softmax_scale, causal)
        for (start, first), (end, last) in pairwise(ends)
        if end > start
    ]
    return torch.cat(parts, 1)[0]
