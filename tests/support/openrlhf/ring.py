"""OpenRLHF's ring attention on a CPU; runs inside its actors, by value.

flash-attn and ring_flash_attn need a GPU. Here the attention kernel is plain torch on the keys and values of all ranks,
and flash-attn's helpers are transformers' own and torch's collectives. Everything else is OpenRLHF's: how a packed
micro-batch is cut into parts, which rank holds which, how log-probs are gathered, the loss, and DeepSpeed's step.
"""

ATTENTION = "ring_on_cpu"
"""Name of the attention for ``--ds.attn_implementation``."""


def share_without_flash_attention(actor):
    """Put the stand-ins in place, before the actor makes its groups and its model.

    Args:
        actor: OpenRLHF's actor of a policy or a reference.
    """
    import sys
    import types

    import torch
    import torch.distributed as dist
    from openrlhf.models import ring_attn_utils
    from transformers import modeling_flash_attention_utils as helpers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class AllGather(torch.autograd.Function):
        """Joins the parts of all ranks along the first dimension; the backward pass adds up their gradients."""

        @staticmethod
        def forward(ctx, part, group):
            ctx.group = group
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, part.contiguous(), group=group)
            return torch.cat(parts)

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.group)
            return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None

    state = {}

    def update_ring_flash_attn_params(cu_seqlens, group):
        state["starts"], state["group"] = cu_seqlens, group

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **others):
        group = state["group"]
        # (1, H, n, D) of this rank; keys and values of all ranks.
        key, value = (
            AllGather.apply(part.transpose(0, 2).contiguous(), group)
            .transpose(0, 2)
            .repeat_interleave(module.num_key_value_groups, dim=1)
            for part in (key, value)
        )
        length = query.shape[2]
        positions = torch.arange(key.shape[2])
        own = positions[dist.get_rank(group) * length :][:length]
        sequence = torch.searchsorted(state["starts"].long(), positions, right=True)
        seen = (sequence[own][:, None] == sequence) & (own[:, None] >= positions)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
        weights = scores.float().softmax(-1).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    ring_attn_utils.index_first_axis = lambda tensor, indices: tensor[indices]
    ring_attn_utils.pad_input = helpers._pad_input
    ring_attn_utils.unpad_input = helpers._unpad_input
    ring_attn_utils.all_gather = AllGather.apply
    package = types.ModuleType("ring_flash_attn")
    package.substitute_hf_flash_attn = lambda group, stride: ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    package.update_ring_flash_attn_params = update_ring_flash_attn_params
    sys.modules["ring_flash_attn"] = package
