"""Matrix products of the output head: float32 results from 16-bit operands, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


@cache
def _mixed_products(device_type: str) -> bool:
    """Return whether torch multiplies 16-bit matrices into a float32 one on this device (CUDA, torch 2.8 or later)."""
    if device_type != "cuda":
        return False
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
        torch.mm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


@cache
def _adds_mixed(device_type: str) -> bool:
    """Return whether torch can add a product of 16-bit matrices to a float32 matrix in place."""
    if not _mixed_products(device_type):
        return False
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
        total = torch.ones(16, 16, dtype=torch.float32, device=device_type)
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that a head's product reads: autocast's on an accelerator, else the wider of the two dtypes."""
    device = hidden.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class Head:
    """An output head, ``hidden @ weight.T + bias``, whose logits are float32 (float64 for float64).

    Args:
        weight: (V, D).
        bias: (V,) or None.
        operands: dtype that products read, from :func:`operand_dtype`.
        block_bytes: bound, in bytes, on converted copies of parts of the weight, if the device cannot mix dtypes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, operands: torch.dtype, block_bytes: int) -> None:
        self.compute = torch.promote_types(operands, torch.float32)
        self.mixed = operands != self.compute and _mixed_products(weight.device.type)
        self.operands = operands if self.mixed else self.compute
        # If the device can mix dtypes, the weight is copied as autocast would copy it. Otherwise parts of the weight
        # are converted when they are needed.
        self.weight = weight.to(self.operands) if self.mixed else weight
        self.bias = bias
        self._step = max(1, block_bytes // max(1, weight.shape[1] * self.compute.itemsize))
        if weight.dtype == self.compute:
            self._step = max(1, weight.shape[0])

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.weight.shape[0], self._step):
            part = slice(start, start + self._step)
            yield part, self.weight[part].to(self.compute)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write the logits of hidden states (n, D) into ``out`` (n, V), float32."""
        hidden = hidden.to(self.operands)
        if self.mixed:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
        else:
            for part, weight in self._blocks():
                torch.mm(hidden, weight.t(), out=out[:, part])
        return out if self.bias is None else out.add_(self.bias)

    def operand(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a float32 gradient (n, V) in the dtype that products read, and its factor for float16 (else None)."""
        if self.operands == self.compute:
            return gradient, None
        if self.operands != torch.float16:
            return gradient.to(self.operands), None
        largest = gradient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        factor = torch.exp2(torch.floor(torch.log2(1024.0 / largest)).clamp(-100, 100))
        return (gradient * factor).to(self.operands), factor

    def hidden_gradient(self, gradient: Tensor, factor: Tensor | None) -> Tensor:
        """Return ``gradient @ weight``, (n, D) in float32."""
        if self.mixed:
            result = torch.mm(gradient, self.weight, out_dtype=torch.float32)
            return result if factor is None else result.div_(factor)
        result = gradient.new_zeros(gradient.shape[0], self.weight.shape[1])
        for part, weight in self._blocks():
            result.addmm_(gradient[:, part], weight)
        return result

    def add_weight_gradient(
        self, total: Tensor, gradient: Tensor, factor: Tensor | None, hidden: Tensor, *, replace: bool
    ) -> None:
        """Add ``gradient.T @ hidden`` to ``total`` (V, D), float32; with ``replace``, overwrite ``total``."""
        hidden = hidden.to(self.operands)
        if not self.mixed:
            total.addmm_(gradient.t(), hidden, beta=0.0 if replace else 1.0)
            return
        if factor is None and replace:
            torch.mm(gradient.t(), hidden, out_dtype=torch.float32, out=total)
            return
        if factor is None and _adds_mixed(total.device.type):
            torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
            return
        for start in range(0, total.shape[0], self._step):
            part = slice(start, start + self._step)
            product = torch.mm(gradient[:, part].t(), hidden, out_dtype=torch.float32)
            if factor is not None:
                product.div_(factor)
            if replace:
                total[part] = product
            else:
                total[part] += product
