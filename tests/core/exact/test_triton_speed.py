"""How fast the Triton kernels run, block size by block size, on 8192 x 152,064 bfloat16 logits. Reported, not asserted.

``python -m pytest -m gpu tests/core/exact`` prints the table with everything else that needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

ROWS, VOCAB = 8192, 152_064
SIZES = [(1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)]
OPTIONS = {"scale": 1.0, "softcap": None, "ref_softcap": None}


class Logits(NamedTuple):
    policy: Tensor
    reference: Tensor
    labels: Tensor
    upstream: Tensor


@pytest.fixture(scope="module")
def logits() -> Iterator[Logits]:
    torch.manual_seed(0)
    reference = torch.empty(ROWS, VOCAB, device="cuda", dtype=torch.bfloat16).normal_(std=4)
    policy = reference + 0.1 * torch.randn_like(reference)
    labels = torch.randint(VOCAB, (ROWS,), device="cuda")
    yield Logits(policy, reference, labels, torch.rand(ROWS, device="cuda"))
    torch.cuda.empty_cache()


def milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median time of a call on the device, after one that compiles."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


@pytest.mark.parametrize(("block", "warps"), SIZES)
def test_every_block_size_gives_the_same_and_says_how_fast(
    logits: Logits, block: int, warps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kl_plugins.kernels.exact import triton_backend as backend

    rows = (logits.policy, logits.reference, logits.labels)
    out = torch.empty_like(logits.policy)

    def backward() -> Tensor:
        return backend.backward(*rows, statistics, logits.upstream, logits.upstream, out=out, **OPTIONS)

    chosen = (block, warps) in (
        (backend.FORWARD_BLOCK, backend.FORWARD_WARPS),
        (backend.BACKWARD_BLOCK, backend.BACKWARD_WARPS),
    )
    statistics = backend.forward(*rows, **OPTIONS)
    gradient = backward()[:64].clone()
    for name, value in (("BLOCK", block), ("WARPS", warps)):
        monkeypatch.setattr(backend, f"FORWARD_{name}", value)
        monkeypatch.setattr(backend, f"BACKWARD_{name}", value)
    found = backend.forward(*rows, **OPTIONS)
    torch.testing.assert_close(found.kl, statistics.kl, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(backward()[:64], gradient, rtol=1e-2, atol=1e-6)

    size = logits.policy.numel() * logits.policy.element_size()
    times = [milliseconds(lambda: backend.forward(*rows, **OPTIONS)), milliseconds(backward)]
    rates = [passes * size / time / 1e6 for passes, time in zip((2, 3), times, strict=True)]
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}, block {block}, {warps} warps{' (in use)' if chosen else ''}: "
            f"forward {times[0]:.2f} ms ({rates[0]:.0f} GB/s), backward {times[1]:.2f} ms ({rates[1]:.0f} GB/s)"
        )
