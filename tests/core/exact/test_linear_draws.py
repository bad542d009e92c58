"""Draws of the reference in ``linear_kl`` and ``exact_kl``: the same as from log-probs that plain torch computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl, linear_kl, reference_top_k
from kl_plugins.exact import TopKKL
from kl_plugins.kernels.exact.selected_products import selected_products
from kl_plugins.reference import RefDraws, RefTopK
from kl_plugins.top_k import top_k_kl

N, D, V, K, M = 13, 6, 50, 3, 5
OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "softcap": 3.0}]


class Case:
    """Hidden states, head and labels, some of which are left out, with a reference that has draws."""

    def __init__(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((N, D), (V, D), (V,))]
        self.labels = torch.randint(V, (N,)).index_fill(0, torch.tensor([2, 7]), -100)
        generator, ref_logits = torch.Generator().manual_seed(1), torch.randn(N, V).double()
        self.reference = reference_top_k(ref_logits, K, labels=self.labels, draws=M, generator=generator, **options)
        every = ref_logits if "softcap" not in options else 3 * torch.tanh(ref_logits / 3)
        every = (every / options.get("temperature", 1.0)).log_softmax(-1)
        self.ref_logp = every.gather(-1, self.labels.clamp_min(0)[:, None])[:, 0]
        self.options: dict[str, Any] = {"reference": self.reference, "ref_logp": self.ref_logp, **options}

    def linearly(self, **changes: Any) -> TopKKL:
        hidden, weight, bias = self.leaves
        return linear_kl(hidden, weight, None, None, self.labels, bias=bias, **{**self.options, **changes})

    def logits(self) -> Tensor:
        hidden, weight, bias = self.leaves
        return hidden @ weight.T + bias

    def plainly(self) -> TopKKL:
        """The same from log-probs that plain torch computes."""
        final = self.logits() if "softcap" not in self.options else 3 * torch.tanh(self.logits() / 3)
        every = (final / self.options.get("temperature", 1.0)).log_softmax(-1)
        logp = every.gather(-1, self.labels.clamp_min(0)[:, None])[:, 0]
        found = top_k_kl(
            every.gather(-1, self.reference.tokens), logp, self.labels, reference=self.reference, ref_logp=self.ref_logp
        )
        kept = self.labels != -100
        return found._replace(logp=logp.masked_fill(~kept, 0.0), ref_logp=found.ref_logp)

    def gradients(self, found: TopKKL, of_logp: bool = True) -> tuple[Tensor, ...]:
        upstream = torch.linspace(-1, 2, N)
        total = (upstream * found.kl).sum() + ((found.remainder * found.logp).sum() if of_logp else 0.0)
        return torch.autograd.grad(total, [leaf for leaf in self.leaves if leaf.requires_grad])


@pytest.mark.parametrize("tile", [None, 3_000])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
def test_results_and_gradients_are_those_of_plain_torch(options: dict[str, Any], tile: int | None) -> None:
    case = Case(torch.float64, options)
    found, plain = case.linearly(max_tile_bytes=tile), case.plainly()
    expected = case.gradients(plain)
    for other in (found, exact_kl(case.logits(), None, case.labels, **case.options)):
        for ours, theirs in zip(other, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        for ours, theirs in zip(case.gradients(other), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    without = case.linearly(reference=case.reference._replace(draws=None))
    assert (found.kl - without.kl).abs().max() > 1e-3, "the draws should matter here"


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_detached_log_prob_has_no_gradient_but_the_draws_have_theirs(frozen: bool) -> None:
    case = Case(torch.float64, {})
    for leaf in case.leaves[1:]:
        leaf.requires_grad_(not frozen)
    found, plain = case.linearly(differentiable_logp=False), case.plainly()
    assert not found.logp.requires_grad
    for ours, theirs in zip(case.gradients(found, False), case.gradients(plain, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_gradient_of_selected_products() -> None:
    torch.manual_seed(2)
    leaves = [torch.randn(*shape).double().requires_grad_() for shape in ((4, D), (V, D), (V,))]
    ids = torch.randint(V, (4, 3)).index_fill(1, torch.tensor([2]), 5)  # one token several times
    for tile in (1, 10**6):
        assert torch.autograd.gradcheck(lambda *given, t=tile: selected_products(*given, ids, torch.float64, t), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_read_as_they_are(dtype: torch.dtype) -> None:
    case = Case(dtype, {})
    found = case.linearly()
    assert found.kl.dtype == torch.float32
    wide = Case(dtype, {})
    wide.leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    torch.testing.assert_close(found.kl.double(), wide.plainly().kl, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(case.gradients(found), wide.gradients(wide.plainly()), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_rows_that_are_left_out_may_hold_anything() -> None:
    case = Case(torch.float32, {})
    with torch.no_grad():
        case.leaves[0][[2, 7]] = torch.nan
    draws = case.reference.draws
    assert draws is not None
    left_out = (case.labels == -100)[:, None]
    draws = draws._replace(ids=draws.ids.masked_fill(left_out, 10**9), logp=draws.logp.masked_fill(left_out, torch.nan))
    case.options["reference"] = case.reference._replace(draws=draws)
    for found in (case.linearly(), exact_kl(case.logits(), None, case.labels, **case.options)):
        assert found.kl[[2, 7]].tolist() == [0, 0]
    for gradient in case.gradients(case.linearly()):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("wrong", ["m", "rows", "label"])
def test_draws_of_other_positions_are_refused(wrong: str) -> None:
    case = Case(torch.float32, {})
    draws = case.reference.draws
    assert draws is not None
    changed: RefDraws = {
        "m": draws._replace(logp=draws.logp[:, 1:]),
        "rows": draws._replace(ids=draws.ids[1:]),
        "label": draws._replace(label_log_rate=draws.label_log_rate[:, None]),
    }[wrong]
    reference: RefTopK = case.reference._replace(draws=changed)
    with pytest.raises(ValueError, match=r"reference\.draws"):
        case.linearly(reference=reference)
