"""Cases for the Triton kernels, and a process that computes them in Triton's interpreter.

Kernels are interpreted only where TRITON_INTERPRET is set before Triton is imported, hence in a process of their own:
``TRITON_INTERPRET=1 python -m tests.core.exact.triton_cases results.pt``.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact.autograd import named
from kl_plugins.kernels.exact.statistics import Options, Rows, Upstream, label_logits


class Case(NamedTuple):
    """Logits to compute, and how.

    Attributes:
        std: of the reference's logits.
        distance: standard deviation of policy minus reference logits.
        labels: ``sampled`` from the policy, or the ``outlier``: the least likely token, and a nat likelier under the
            reference, which makes no difference to the KL.
        masked: ``scattered``: every third token has no mass under the policy, every seventh under neither; ``head``:
            the first 1500 tokens have none under the policy and little under the reference.
        layout: ``contiguous``, ``strided`` rows, ``transposed`` or ``expanded`` (all rows one).
    """

    rows: int = 5
    vocab: int = 1000
    dtype: torch.dtype = torch.float32
    std: float = 4.0
    distance: float = 0.1
    temperature: float = 1.0
    softcap: float | None = None
    ref_softcap: float | None = None
    labels: str = "sampled"
    masked: str = ""
    ignored: bool = False
    layout: str = "contiguous"


BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    **{f"vocab {vocab}": Case(vocab=vocab) for vocab in (2, 127, 1024, 1025, 4096, 5003)},
    "a single token": Case(vocab=1, distance=0.0),
    "a large vocabulary": Case(rows=2, vocab=152_064, dtype=BF16),
    "one row": Case(rows=1, vocab=3000),
    **{f"distance {distance}": Case(vocab=3000, distance=distance) for distance in (8.0, 1.0, 0.01, 0.005)},
    "the same": Case(distance=0.0),
    "std 1": Case(std=1.0, distance=0.005, vocab=3000),
    "std 8": Case(std=8.0, vocab=3000),
    "far apart": Case(std=30.0, distance=30.0),
    "bf16": Case(dtype=BF16, vocab=3000),
    "bf16, near": Case(dtype=BF16, vocab=3000, distance=0.005),
    "fp16": Case(dtype=FP16, vocab=3000),
    "temperature": Case(temperature=0.7),
    "temperature, near": Case(temperature=0.7, std=8.0, distance=0.005),
    "soft cap": Case(softcap=30.0, ref_softcap=30.0, temperature=0.7),
    "soft cap, near": Case(softcap=30.0, ref_softcap=30.0, std=8.0, distance=0.005),
    "soft cap, bf16": Case(softcap=30.0, ref_softcap=30.0, dtype=BF16),
    "soft cap of the policy": Case(softcap=20.0, temperature=1.3),
    "soft cap of the reference": Case(ref_softcap=20.0),
    "different soft caps": Case(softcap=30.0, ref_softcap=20.0),
    "soft cap of the reference, near": Case(ref_softcap=12.0, distance=0.0045, temperature=0.5),
    "different soft caps, near": Case(softcap=30.0, ref_softcap=50.0, distance=0.0045),
    "different soft caps, small logits": Case(softcap=30.0, ref_softcap=50.0, std=1.0, distance=0.0045),
    "soft cap, hot": Case(softcap=30.0, ref_softcap=30.0, std=8.0, distance=0.25, temperature=0.6),
    "outlying labels": Case(std=2.0, labels="outlier"),
    "outlying labels, near": Case(std=2.0, labels="outlier", distance=0.005),
    "masked tokens": Case(masked="scattered", std=2.0),
    "masked tokens, bf16": Case(masked="scattered", std=2.0, dtype=BF16, vocab=2000),
    "masked head": Case(masked="head", std=1.0, distance=0.005, vocab=3000),
    "ignored rows": Case(ignored=True),
    "strided rows": Case(layout="strided"),
    "transposed": Case(layout="transposed"),
    "expanded": Case(layout="expanded"),
}


class Inputs(NamedTuple):
    logits: Tensor
    ref_logits: Tensor
    labels: Tensor
    grad_kl: Tensor
    grad_logp: Tensor


class Results(NamedTuple):
    kl: Tensor
    logp: Tensor
    ref_logp: Tensor
    gradient: Tensor


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ref_logits = normal(case.rows, case.vocab) * case.std
    logits = (ref_logits + case.distance * normal(case.rows, case.vocab)).to(case.dtype)
    ref_logits = ref_logits.to(case.dtype)
    if case.masked == "head":
        logits[:, :1500] = -torch.inf
        ref_logits[:, :1500] -= 12.0
    if case.masked == "scattered":
        logits[:, ::3] = -torch.inf
        logits[:, ::7] = ref_logits[:, ::7] = -torch.inf
    if case.layout == "expanded":
        logits, ref_logits = (logits[:1].expand_as(logits), ref_logits[:1].expand_as(logits))
    if case.labels == "outlier":
        labels = logits.argmin(-1)
        ref_logits.scatter_add_(-1, labels[:, None], torch.ones(case.rows, 1, dtype=case.dtype))
    else:
        labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
    if case.layout == "strided":
        logits, ref_logits = _strided(logits, 17), _strided(ref_logits, 5)
    if case.layout == "transposed":
        logits, ref_logits = logits.T.contiguous().T, ref_logits.T.contiguous().T
    if case.ignored:
        labels[1::2] = -100
        logits[1::2] = torch.nan
    return Inputs(logits, ref_logits, labels, torch.rand(case.rows, generator=generator), normal(case.rows))


def _strided(logits: Tensor, margin: int) -> Tensor:
    # NaN in the margin: what is read there is seen.
    wide = torch.full((logits.shape[0], logits.shape[1] + 2 * margin), torch.nan, dtype=logits.dtype)
    wide[:, margin:-margin] = logits
    return wide[:, margin:-margin]


def reference(case: Case) -> Results:
    """The same in float64, by the textbook."""
    return reference_of(inputs(case), case)


def reference_of(given: Inputs, case: Case) -> Results:
    """The same of inputs that were altered."""
    logits, ref_logits, labels, grad_kl, grad_logp = given
    kept = labels != -100
    logits = logits.double().masked_fill(~kept[:, None], 0.0).requires_grad_()
    logp = torch.log_softmax(_scaled(logits, case.temperature, case.softcap), -1)
    ref_logp = torch.log_softmax(_scaled(ref_logits.double(), case.temperature, case.ref_softcap), -1)
    massive = logp > -torch.inf
    kl = torch.where(massive, logp.exp() * torch.where(massive, logp - ref_logp, 0.0), 0.0).sum(-1)
    index = labels.clamp_min(0)[:, None]
    at_label, ref_at_label = logp.gather(-1, index)[:, 0], ref_logp.gather(-1, index)[:, 0]
    (gradient,) = torch.autograd.grad((kl * grad_kl + at_label * grad_logp)[kept].sum(), logits)
    return Results(*((part * kept).detach() for part in (kl, at_label, ref_at_label)), gradient)


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def compute(case: Case, device: str, *, gradient_dtype: torch.dtype = torch.float32) -> Results:
    """By the kernels. Gradients in float32, which shows more than 16 bits would."""
    from kl_plugins.kernels.exact import triton_backend

    rows, upstream = named(tuple(_moved(part, device) for part in inputs(case)), Rows, Upstream)
    options = Options(1 / case.temperature, case.softcap, case.ref_softcap)
    statistics = triton_backend.forward(rows, options)
    out = torch.full(rows.logits.shape, torch.nan, dtype=gradient_dtype, device=device)
    gradient = triton_backend.backward(rows, statistics, upstream, options, out)
    return Results(statistics.kl.cpu(), statistics.logp.cpu(), statistics.ref_logp.cpu(), gradient.cpu())


def _moved(tensor: Tensor, device: str) -> Tensor:
    if device == "cpu":
        return tensor
    # .to(device) would make strided tensors contiguous.
    base = tensor._base if tensor._base is not None else tensor
    return base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def public(device: str) -> Results:
    """A case by way of autograd and the public function."""
    from kl_plugins import exact_kl

    logits, ref_logits, labels, grad_kl, grad_logp = (part.to(device) for part in inputs(CASES["bf16"]))
    logits.requires_grad_()
    shape = (1, *labels.shape)
    found = exact_kl(logits[None], ref_logits[None], labels[None], backend="triton")
    (gradient,) = torch.autograd.grad((found.kl * grad_kl + found.logp * grad_logp).sum(), logits)
    assert found.kl.shape == shape
    return Results(*(part[0].detach().cpu() for part in found), gradient.cpu())


def main(path: str) -> None:
    from kl_plugins.kernels.exact.triton_backend import INTERPRETED

    if not INTERPRETED:
        raise SystemExit("TRITON_INTERPRET=1 is not set")
    results = {name: tuple(compute(case, "cpu")) for name, case in CASES.items()}
    results["fp16, steep"] = tuple(steep("cpu"))
    results["public"] = tuple(public("cpu"))
    results["ignored sums"] = (ignored_sums("cpu"),)
    torch.save(results, path)


def ignored_sums(device: str) -> Tensor:
    """What the forward kernel leaves of rows that it need not read."""
    from kl_plugins.kernels.exact import triton_backend

    rows, *_ = named(tuple(part.to(device) for part in inputs(CASES["ignored rows"])), Rows)
    options = Options()
    sums = torch.stack(triton_backend.part_sums(rows, label_logits(rows, options), options))
    assert sums[:, rows.labels >= 0].any()
    return sums[:, rows.labels < 0].cpu()


def steep(device: str) -> Results:
    """An upstream gradient that float16 cannot hold."""
    from kl_plugins.kernels.exact import triton_backend

    rows, upstream = named(tuple(part.to(device) for part in inputs(CASES["fp16"])), Rows, Upstream)
    options = Options()
    statistics = triton_backend.forward(rows, options)
    gradient = triton_backend.backward(rows, statistics, upstream._replace(kl=upstream.kl * 1e9), options)
    return Results(statistics.kl.cpu(), statistics.logp.cpu(), statistics.ref_logp.cpu(), gradient.cpu())


if __name__ == "__main__":
    main(sys.argv[1])
