"""Which backend computes: automatically, by argument, by environment; the compiled one agrees with the eager one."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl, linear_kl
from kl_plugins.kernels import backend
from kl_plugins.kernels.backend import COMPILE_ABOVE, BackendError, BackendStatus
from kl_plugins.kernels.exact import backends, compiled, eager
from kl_plugins.kernels.exact.backends import EXACT_ENVIRONMENT_VARIABLE, exact_backend, exact_backend_status
from tests.core.exact.support import make_rows, norm_error, textbook

pytestmark = [
    # torch's own, while it compiles.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

SMALL, LARGE = torch.zeros(2, 8), torch.zeros(2, COMPILE_ABOVE // 2)
needs_compiler = pytest.mark.skipif(not backend.backend_status("cpu").usable, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(EXACT_ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_failed", set())
    for cached in (backend.backend_status, backend.say_once):
        cached.cache_clear()
    yield
    for cached in (backend.backend_status, backend.say_once):
        cached.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@needs_compiler
def test_size_and_dtype_decide() -> None:
    assert exact_backend("auto", SMALL).name == "eager"
    assert exact_backend("auto", LARGE).name == "compiled"
    assert exact_backend("auto", LARGE.double()).name == "eager"


@needs_compiler
def test_the_environment_decides_where_the_argument_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXACT_ENVIRONMENT_VARIABLE, "eager")
    assert exact_backend("auto", LARGE).name == "eager"
    assert exact_backend("compiled", SMALL).name == "compiled"
    monkeypatch.setenv(EXACT_ENVIRONMENT_VARIABLE, "compiled")
    assert exact_backend("auto", SMALL).name == "compiled"
    assert exact_backend("eager", SMALL).name == "eager"


def test_unknown_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(2, 8)
    with pytest.raises(BackendError, match=r"backend='cuda': expected one of auto, eager, compiled, triton"):
        exact_kl(*rows, backend="cuda")
    monkeypatch.setenv(EXACT_ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(BackendError, match=r"KL_PLUGINS_EXACT_BACKEND='fast': expected one of"):
        exact_kl(*rows)
    with pytest.raises(BackendError, match="KL_PLUGINS_EXACT_BACKEND"):
        linear_kl(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2).long())


@pytest.mark.usefixtures("no_compiler")
def test_a_backend_asked_for_by_name_must_be_there(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendError, match=r"backend='compiled' on cpu: no C\+\+ compiler"):
        exact_backend("compiled", SMALL)
    with caplog.at_level(logging.WARNING, logger="kl_plugins"):
        assert [exact_backend("auto", LARGE).name for _ in range(3)] == ["eager"] * 3
    assert len(caplog.records) == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_triton_that_is_not_installed() -> None:
    assert not exact_backend_status("triton").usable
    with pytest.raises(BackendError, match=r"backend='triton' on cpu: the triton package cannot be imported"):
        exact_backend("triton", SMALL)


def test_an_accelerator_takes_triton_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "triton"), (False, "compiled")):
        monkeypatch.setattr(
            backends, "exact_backend_status", lambda *_, there=there: BackendStatus(there, "as the test says")
        )
        monkeypatch.setattr(backends, "backend_status", lambda *_: BackendStatus(True, "as the test says"))
        assert backends._automatic(COMPILE_ABOVE, torch.bfloat16, "cuda") == expected


def everything(rows: tuple[Tensor, ...], name: str, **options: float) -> list[Tensor]:
    leaf = rows[0].detach().clone().requires_grad_()
    found = exact_kl(leaf, *rows[1:], backend=name, **options)
    (found.kl - 0.5 * found.logp).sum().backward()
    assert leaf.grad is not None
    return [*(part.detach() for part in found), leaf.grad]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def test_compiled_agrees_with_eager(dtype: torch.dtype) -> None:
    rows = make_rows(24, 3001, dtype=dtype, distance=0.05)
    labels = rows.labels.clone()
    logits, ref_logits = rows.logits.clone(), rows.ref_logits.clone()
    labels[3], logits[3] = -100, torch.nan
    logits[4, :7], ref_logits[5, :7] = -torch.inf, -torch.inf
    ref_logits[6] += 2000.0  # computed in float64, in both directions
    both = [everything((logits, ref_logits, labels), name) for name in ("compiled", "eager")]
    for index, (found, wanted) in enumerate(zip(*both, strict=True)):
        rtol = 8e-3 if found.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=2e-6 if index in (1, 2) else 1e-7)
    small = make_rows(24, 3001, dtype=dtype, distance=0.005)
    assert norm_error(exact_kl(*small, backend="compiled").kl, textbook(*small).kl) < 1e-5


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"softcap": 30.0, "ref_softcap": 30.0}, {"softcap": 20.0}], ids=str
)
def test_compiled_options_agree_with_eager(options: dict[str, float]) -> None:
    rows = make_rows(24, 3001)
    for found, wanted in zip(*(everything(rows, name, **options) for name in ("compiled", "eager")), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@needs_compiler
@pytest.mark.full
def test_hidden_states_by_the_compiled_backend() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(24, 16), torch.randn(3001, 16), torch.randn(24, 16), torch.randn(3001, 16)]
    found = []
    for name in ("compiled", "eager"):
        hidden, weight = (x.clone().requires_grad_() for x in tensors[:2])
        labels = torch.arange(24)
        loss = linear_kl(
            hidden, weight, *tensors[2:], labels, kl_weight=torch.ones(24), logp_weight=torch.ones(24), backend=name
        ).loss
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def broken(*_: object) -> None:
    raise RuntimeError("as a compiler would")


def test_a_broken_compiler_costs_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "_compiled", lambda function: broken)
    monkeypatch.setattr(backends, "backend_status", lambda *_: BackendStatus(True, "as the test says"))
    rows = make_rows(32, COMPILE_ABOVE // 16)
    with caplog.at_level(logging.WARNING, logger="kl_plugins"):
        for _ in range(2):
            found = everything(rows, "auto")
    assert len(caplog.records) == 1
    for one, other in zip(found, everything(rows, "eager"), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="as a compiler would"):
        exact_kl(*rows, backend="compiled")


def test_the_backends_have_one_signature() -> None:
    for name in ("forward", "backward"):
        one, other = (getattr(module, name).__kwdefaults__ or {} for module in (eager, compiled))
        assert one.keys() - {"tile_bytes"} == other.keys() - {"forced"}


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of its own graph
def test_an_outer_compile_calls_them_as_they_are() -> None:
    rows = make_rows(4, 50)

    def loss(logits: Tensor) -> Tensor:
        return exact_kl(logits * 2, rows.ref_logits, rows.labels).kl.sum() * 3

    leaves = [rows.logits.clone().requires_grad_() for _ in range(2)]
    for leaf, function in zip(leaves, (loss, torch.compile(loss, backend="eager")), strict=True):
        function(leaf).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
