"""Writes down what each update of an actor is made of, if ``RECORD_UPDATES`` names a folder.

One file per mini-batch, ``000000.pt`` and so on: the parameters before the update, their gradients before clipping,
and the rows of the mini-batch. For one rank.
"""

import functools
import os
from pathlib import Path

import torch
import wrapt

ROWS = ("old_log_probs", "rollout_log_probs", "ref_log_prob", "advantages", "response_mask")


def install():
    if os.environ.get("RECORD_UPDATES"):
        wrapt.register_post_import_hook(_record, "verl.workers.engine.fsdp.transformer_impl")


def _record(module):
    original = module.FSDPEngine.forward_backward_batch

    @functools.wraps(original)
    def forward_backward_batch(self, data, loss_function, forward_only=False):
        if forward_only or "advantages" not in data.keys():  # noqa: SIM118  TensorDict has no plain `in`
            return original(self, data, loss_function, forward_only=forward_only)
        parameters = {name: _whole(value) for name, value in self.module.named_parameters()}
        rows = list(_rows(data))
        result = original(self, data, loss_function, forward_only=forward_only)
        gradients = {name: _whole(value.grad) for name, value in self.module.named_parameters()}
        folder = Path(os.environ["RECORD_UPDATES"])
        path = folder / f"{len(list(folder.glob('*.pt'))):06}.pt"
        torch.save({"parameters": parameters, "gradients": gradients, "rows": rows}, path)
        return result

    module.FSDPEngine.forward_backward_batch = forward_backward_batch


def _whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def _rows(data):
    ids = data["input_ids"].unbind()
    fields = {key: _unpacked(data[key]) for key in ROWS}
    for row, tokens in enumerate(ids):
        length = int(fields["response_mask"][row].sum())
        yield {"ids": tokens.clone(), **{key: values[row][:length].clone() for key, values in fields.items()}}


def _unpacked(field):
    return list(field.unbind()) if field.is_nested else list(field)
