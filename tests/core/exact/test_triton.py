"""The Triton kernels against float64: interpreted everywhere, for real where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_plugins import exact_kl
from kl_plugins.kernels.backend import BackendError
from kl_plugins.kernels.exact.backends import exact_backend_status
from kl_plugins.kernels.exact.statistics import Options, Rows
from tests.core.exact.accuracy import ROOM
from tests.core.exact.triton_cases import CASES, Case, Results, compute, inputs, public, reference, steep

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, computed by Triton's interpreter in one process."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.exact.triton_cases", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Results(*parts) if len(parts) == 4 else parts for name, parts in torch.load(path).items()}


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


def check(found: Results, case: Case, *, gradient: float = ROOM * 1e-4) -> None:
    true = reference(case)
    assert all(part.isfinite().all() for part in found)
    assert (found.kl >= 0).all()
    if case.distance == 0:
        assert (found.kl < 1e-12).all()
    else:
        assert relative(found.kl, true.kl) <= ROOM * 1e-5
    # Absolute: onehot - p, where p is 1 - 1e-6, has no more digits in float32.
    assert (found.gradient.double() - true.gradient).norm() <= gradient * true.gradient.norm() + ROOM * 5e-6
    torch.testing.assert_close(found.logp.double(), true.logp, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(found.ref_logp.double(), true.ref_logp, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_agree_with_float64(interpreted: dict[str, Any], name: str) -> None:
    check(interpreted[name], CASES[name])


def test_ignored_rows_are_exactly_zero_whatever_they_hold(interpreted: dict[str, Any]) -> None:
    ignored = inputs(CASES["ignored rows"]).labels == -100
    assert ignored.any()
    assert all(not part[ignored].any() for part in interpreted["ignored rows"])


def test_ignored_rows_are_not_even_read(interpreted: dict[str, Any]) -> None:
    (sums,) = interpreted["ignored sums"]
    assert sums.numel()
    assert not sums.any()  # they hold NaN


def test_a_gradient_beyond_float16_saturates(interpreted: dict[str, Any]) -> None:
    gradient = interpreted["fp16, steep"].gradient
    assert gradient.dtype == torch.float16
    assert gradient.isfinite().all()
    assert (gradient.abs() == torch.finfo(torch.float16).max).any()


def test_the_public_function_reaches_the_kernels(interpreted: dict[str, Any]) -> None:
    assert interpreted["public"].gradient.dtype == torch.bfloat16
    # Triton's interpreter truncates to bfloat16, where a GPU rounds: each number is off by up to 2^-7, 7.8e-3.
    check(interpreted["public"], CASES["bf16"], gradient=8e-3)


def test_float64_logits_are_refused() -> None:
    backend = pytest.importorskip("kl_plugins.kernels.exact.triton_backend")
    logits, options = torch.zeros(1, 8, dtype=torch.float64), Options()
    with pytest.raises(BackendError, match="float64"):
        backend.forward(Rows(logits, logits, torch.zeros(1, dtype=torch.int64)), options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_backend_says_so() -> None:
    pytest.importorskip("triton")
    assert exact_backend_status("triton", "cuda") == (False, "no CUDA device is visible to this process")
    with pytest.raises(BackendError, match=r"on cpu: the Triton kernels run on CUDA devices, not on cpu"):
        exact_kl(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), backend="triton")


def test_without_triton_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # import triton now raises ImportError
    for name in ("triton_backend", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"kl_plugins.kernels.exact.{name}", raising=False)
    status = exact_backend_status("triton", "cuda")
    assert not status.usable
    assert "triton package cannot be imported" in status.reason
    found = exact_kl(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64))
    assert found.kl.tolist() == [0.0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_agree_with_float64(name: str) -> None:
    check(compute(CASES[name], "cuda"), CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16", "soft cap, bf16", "masked tokens, bf16"])
def test_compiled_gradients_in_16_bits(name: str) -> None:
    case = CASES[name]
    check(compute(case, "cuda", gradient_dtype=case.dtype), case, gradient=5e-3)


@pytest.mark.gpu
def test_the_public_function_takes_the_kernels_on_a_gpu() -> None:
    check(public("cuda"), CASES["bf16"], gradient=5e-3)
    assert steep("cuda").gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "vocab"), [(70_000, 300), (16_384, 152_064)], ids=["over 65,535 rows", "over 2^31 logits"]
)
def test_sizes_beyond_16_and_32_bits(rows: int, vocab: int) -> None:
    from kl_plugins.kernels.exact import triton_backend

    torch.manual_seed(0)
    ref_logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16).normal_(std=4)
    logits = (ref_logits + 0.1 * torch.randn_like(ref_logits)).requires_grad_()
    labels = torch.randint(vocab, (rows,), device="cuda")
    found = exact_kl(logits, ref_logits, labels, backend="triton")
    (gradient,) = torch.autograd.grad(found.kl.sum(), logits)
    assert triton_backend.status("cuda").usable
    for rows_of in (slice(0, 8), slice(rows // 2, rows // 2 + 8), slice(rows - 8, rows)):
        part = logits[rows_of].detach().double().requires_grad_()
        logp, ref_logp = part.log_softmax(-1), ref_logits[rows_of].double().log_softmax(-1)
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)
        (true,) = torch.autograd.grad(kl.sum(), part)
        assert relative(found.kl[rows_of].detach(), kl.detach()) <= 1e-5
        assert relative(gradient[rows_of], true) <= 5e-3


@pytest.mark.gpu
def test_two_runs_agree_bit_by_bit() -> None:
    one, other = (compute(CASES["a large vocabulary"], "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
