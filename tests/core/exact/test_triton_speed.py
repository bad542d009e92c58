"""How fast the Triton kernels run, block size by block size, on 8192 x 152,064 bfloat16 logits. Reported, not asserted.

``python -m pytest -m gpu tests/core/exact`` prints the table with everything else that needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kl_plugins.kernels.exact.statistics import Options, Rows, Upstream

pytestmark = pytest.mark.gpu
Capture = pytest.CaptureFixture[str]

ROWS, VOCAB = 8192, 152_064
FORWARD_SIZES = [(1024, 4), (2048, 4), (4096, 4), (2048, 8), (4096, 8), (8192, 8)]
STAGES = (1, 2, 3)
BACKWARD_SIZES = [(1024, 4), (2048, 4), (4096, 8), (8192, 8)]
OPTIONS = Options()


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


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(("block", "warps"), FORWARD_SIZES)
def test_every_forward_gives_the_same_and_says_how_fast(
    logits: Logits, block: int, warps: int, stages: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from kl_plugins.kernels.exact import triton_backend as backend

    rows = Rows(logits.policy, logits.reference, logits.labels)
    statistics = backend.forward(rows, OPTIONS)
    chosen = (block, warps, stages) == (backend.FORWARD_BLOCK, backend.FORWARD_WARPS, backend.FORWARD_STAGES)
    for name, value in (("BLOCK", block), ("WARPS", warps), ("STAGES", stages)):
        monkeypatch.setattr(backend, f"FORWARD_{name}", value)
    found = backend.forward(rows, OPTIONS)
    torch.testing.assert_close(found.kl, statistics.kl, rtol=1e-5, atol=1e-8)
    say(f"forward, block {block}, {warps} warps, {stages} stages", chosen, capsys,
        2, logits.policy, milliseconds(lambda: backend.forward(rows, OPTIONS)))  # fmt: skip


@pytest.mark.parametrize(("block", "warps"), BACKWARD_SIZES)
def test_every_backward_gives_the_same_and_says_how_fast(
    logits: Logits, block: int, warps: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from kl_plugins.kernels.exact import triton_backend as backend

    rows = Rows(logits.policy, logits.reference, logits.labels)
    statistics = backend.forward(rows, OPTIONS)
    upstream = Upstream(logits.upstream, logits.upstream)
    out = torch.empty_like(logits.policy)

    def backward() -> Tensor:
        return backend.backward(rows, statistics, upstream, OPTIONS, out)

    gradient = backward()[:64].clone()
    chosen = (block, warps) == (backend.BACKWARD_BLOCK, backend.BACKWARD_WARPS)
    for name, value in (("BLOCK", block), ("WARPS", warps)):
        monkeypatch.setattr(backend, f"BACKWARD_{name}", value)
    torch.testing.assert_close(backward()[:64], gradient, rtol=1e-2, atol=1e-6)
    say(f"backward, block {block}, {warps} warps", chosen, capsys, 3, logits.policy, milliseconds(backward))


def say(what: str, chosen: bool, capsys: Capture, passes: int, logits: Tensor, time: float) -> None:
    """Print a time, and the rate of what has to be read and written."""
    rate = passes * logits.numel() * logits.element_size() / time / 1e6
    used = " (in use)" if chosen else ""
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {what}{used}: {time:.2f} ms ({rate:.0f} GB/s)")
