"""torch.func and torch.compile(fullgraph=True) see the same term."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec, estimators, kl_penalty, kl_term, register_estimator
from kl_plugins.kernels import backend
from tests.support.core.tensors import Batch, batch

SPECS = ["k2@loss/is:token/cap:2", "alpha-0.5@loss/horizon:sequence/gamma:0.5/is:decision/norm", "k3@loss/clip:0.2"]
SPECS += ["exact@loss/horizon:sequence/is:decision/band:0.5-2", "k2@loss/is:token/floor:0.7/cap:1.2"]
SPECS += ["exact@loss/top:8/is:token/floor:0.7/cap:1.2"]

# Dynamo makes an instance of every autograd.Function it traces, and inductor uses torch.jit: torch deprecates both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    backend._compiled.cache_clear()
    yield
    torch._dynamo.reset()


def gradients(spec: KLSpec, data: Batch) -> tuple[Tensor, ...]:
    data = data.leaves()
    term = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    term.loss.square().sum().backward()
    assert data.logp.grad is not None
    exact = torch.zeros_like(data.logp) if data.exact.grad is None else data.exact.grad
    return term.loss.detach(), data.logp.grad, exact


@pytest.mark.parametrize("text", SPECS)
def test_grad(text: str) -> None:
    spec, data = KLSpec.parse(text), batch(3, 5)

    def objective(logp: Tensor, exact: Tensor) -> Tensor:
        given = data._replace(exact=exact).keywords(spec)
        return kl_term(spec, logp, data.ref, data.mask, **given).loss.square().sum()

    found = torch.func.grad(objective, argnums=(0, 1))(data.logp, data.exact)
    for one, other in zip(found, gradients(spec, data)[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("text", SPECS)
def test_vmap_of_grad(text: str) -> None:
    spec, many = KLSpec.parse(text), [batch(3, 5, seed=seed) for seed in range(4)]
    stacked = Batch(*(torch.stack(field) for field in zip(*many, strict=True)))

    def objective(logp: Tensor, exact: Tensor, rest: Batch) -> Tensor:
        data = rest._replace(exact=exact)
        return kl_term(spec, logp, data.ref, data.mask, **data.keywords(spec)).loss.square().sum()

    found = torch.func.vmap(torch.func.grad(objective, argnums=(0, 1)))(stacked.logp, stacked.exact, stacked)
    for k, data in enumerate(many):
        for one, other in zip(found, gradients(spec, data)[1:], strict=True):
            torch.testing.assert_close(one[k], other)


def test_second_derivatives_are_those_of_a_linear_term() -> None:
    spec, data = KLSpec.parse("k2@loss"), batch(2, 3, "full").leaves()
    loss = kl_term(spec, data.logp, data.ref, data.mask).loss
    (first,) = torch.autograd.grad(loss.square().sum(), data.logp, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), data.logp)
    # d/dlogp of 2 loss * c with c detached is 2 c^2.
    coefficient = (data.logp - data.ref).detach()
    torch.testing.assert_close(second, 2 * coefficient**2)


@pytest.mark.parametrize("text", SPECS)
def test_compiled_into_the_hosts_graph(text: str) -> None:
    spec, data = KLSpec.parse(text), batch(3, 5).to(torch.float32)
    wanted = gradients(spec, data)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logp: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        term = kl_term(spec, logp, data.ref, data.mask, **data._replace(exact=exact).keywords(spec))
        return term.loss, term.metrics["kl/ess"]

    leaves = data.leaves()
    loss, _ = step(leaves.logp, leaves.exact)
    loss.square().sum().backward()
    torch.testing.assert_close(loss.detach(), wanted[0])
    torch.testing.assert_close(leaves.logp.grad, wanted[1])
    if spec.estimator == "exact":
        torch.testing.assert_close(leaves.exact.grad, wanted[2])


def test_a_registered_row_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_TABLE", dict(estimators._TABLE))
    register_estimator("triangle", f=lambda d: (d - 1) ** 2 / (d + 1))
    spec, data = KLSpec.parse("triangle@loss"), batch(3, 5)
    found = torch.compile(lambda u: kl_term(spec, u, data.ref, data.mask).coefficient, fullgraph=True, backend="eager")
    torch.testing.assert_close(found(data.logp), kl_term(spec, data.logp, data.ref, data.mask).coefficient)


needs_compiler = pytest.mark.skipif(not backend.backend_status("cpu").compiled, reason="no C++ compiler")


def on_both_backends(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], tuple[Tensor, ...]]) -> None:
    results = []
    for name in ("eager", "compiled"):
        monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, name)
        assert backend.chosen_backend(1, "cpu") == name
        results.append(compute())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@needs_compiler
@pytest.mark.parametrize("text", [SPECS[0], *(pytest.param(text, marks=pytest.mark.full) for text in SPECS[1:])])
def test_the_compiled_term_agrees_with_the_eager_one(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for data in (batch(3, 5), batch(2, 9)):
        on_both_backends(monkeypatch, lambda data=data: gradients(KLSpec.parse(text), data.to(torch.float32)))


@needs_compiler
@pytest.mark.full
def test_the_compiled_penalty_agrees_with_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, data = KLSpec.parse("k1@advantage/gamma:0.9"), batch().to(torch.float32)
    on_both_backends(monkeypatch, lambda: (kl_penalty(spec, data.logp, data.ref, data.mask),))
