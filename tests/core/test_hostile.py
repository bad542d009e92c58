"""Any finite float, any spec, any mask: every output and gradient is finite, and 0 outside the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kl_plugins import KLSpec, kl_penalty, kl_term
from tests.support.core.specs import Written, written_specs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTH = 8
CI, FULL = (50, 200), pytest.param((500, 2000), marks=pytest.mark.full)
"""Examples, and sequences per example: 10^4 cases in CI, 10^6 in full."""

BOUNDS = ("", "", "/bound:1e-3", "/bound:59", "/bound:61", "/bound:599", "/bound:1e300", "/bound:5e-324")
CAPS = ("", "", "/cap:1e-40", "/cap:1e38", "/cap:1e300", "/cap:5e-324", "/band:1e-300-1e300", "/band:1e9-1e99")
ALPHAS = ("alpha-1e-300", "alpha-1e-6", "alpha-0.999", "alpha-100", "alpha-1e20", "alpha-1e300")


def hostile(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite floats of every size: limits of the dtype, denormals, round numbers, random bits, and tame ones."""
    info = torch.finfo(dtype)
    tiny = torch.tensor([info.tiny, info.smallest_normal], dtype=torch.float64)
    sizes = [
        0.0,
        0.0,
        info.max,
        info.max / 2,
        info.eps,
        *tiny.tolist(),
        info.tiny / 4,
        1e-8,
        1e-3,
        1.0,
        1.0,
        5.0,
        29.99,
    ]
    sizes += [30.0, 44.0, 60.0, 88.7, 100.0, 709.0, 1e3, 1e4, 10001.0, 6e4, 1e5, 1e19, 1e30, 1e38, 1e150, 1e300]
    pool = torch.tensor([min(size, info.max) for size in sizes], dtype=torch.float64)
    shape = (rows, LENGTH)
    picked = pool[torch.randint(len(pool), shape, generator=generator)]
    sign = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    anything = 10 ** (exponent * torch.log10(torch.tensor(info.max, dtype=torch.float64)))
    tame = torch.rand(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(4, shape, generator=generator)
    drawn = sign * torch.where(kind == 0, anything, torch.where(kind == 1, tame, picked))
    found = drawn.clamp(info.min, info.max).to(dtype)
    assert found.isfinite().all()
    return found


def check(name: str, tensor: Tensor | None, mask: Tensor | None = None) -> None:
    assert tensor is not None, name
    assert tensor.isfinite().all(), name
    if mask is not None:
        assert (tensor[~mask] == 0).all(), f"{name} outside the mask"


def draw_inputs(rows: int, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [hostile(rows, dtype, generator) for _ in range(5)]
    tensors[4] = tensors[4].abs()  # a full-vocabulary KL is not negative
    share = torch.rand(rows, 1, generator=generator) * 1.2
    mask = torch.rand(rows, LENGTH, generator=generator) < share
    upstream = hostile(rows, dtype, generator).double().clamp(-65504, 65504).to(dtype)  # loss scaling, and a weight
    if seed % 2:  # the padding is as bad as can be
        tensors = [x.masked_fill(~mask, float("nan")) for x in tensors]
        upstream = upstream.masked_fill(~mask, float("nan"))
    return tensors, mask, upstream


@pytest.mark.parametrize("size", [CI, FULL], ids=str)
def test_term(size: tuple[int, int]) -> None:
    examples, rows = size

    @settings(max_examples=examples, database=None)
    @given(written_specs(placements=("loss",)), st.sampled_from(BOUNDS), st.sampled_from(CAPS), st.integers(0, 2**32))
    def run(written: Written, bound: str, cap: str, seed: int) -> None:
        text = written.canonical
        text += bound if "bound" not in text else ""
        beside_floor = "/floor:" not in text or cap in ("/cap:1e38", "/cap:1e300")
        text += cap if "/is:" in text and cap[1:4] not in text and beside_floor else ""
        text = text.replace("/clip:1e7", "/clip:1e300").replace("/floor:1e-3", "/floor:5e-324")
        text = text.replace("alpha-3@", f"{ALPHAS[seed % len(ALPHAS)]}@")
        spec, dtype = KLSpec.parse(text), DTYPES[seed % 7 % len(DTYPES)]
        (logp, ref, old, sampler, exact), mask, upstream = draw_inputs(rows, dtype, seed)
        logp, exact = logp.requires_grad_(), exact.requires_grad_()
        given_exact = {"exact": exact} if spec.needs_exact else {}
        given_exact |= {} if spec.top is None else {"remainder": sampler}
        term = kl_term(spec, logp, ref, mask, old_logp=old, sampler_logp=sampler, **given_exact)
        term.loss.backward(upstream)
        check("gradient", logp.grad, mask)
        if spec.estimator == "exact":
            check("exact gradient", exact.grad, mask)
        for name in ("value", "coefficient", "loss", "weight"):
            check(name, getattr(term, name), mask)
        for key, value in term.metrics.items():
            check(key, value)

    run()


@pytest.mark.parametrize("size", [CI, FULL], ids=str)
def test_penalty(size: tuple[int, int]) -> None:
    examples, rows = size

    @settings(max_examples=examples, database=None)
    @given(written_specs(placements=("reward", "advantage")), st.sampled_from(BOUNDS), st.integers(0, 2**32))
    def run(written: Written, bound: str, seed: int) -> None:
        text = written.canonical + (bound if "bound" not in written.canonical else "")
        spec = KLSpec.parse(text.replace("alpha-3@", f"{ALPHAS[seed % len(ALPHAS)]}@"))
        (logp, ref, _, _, exact), mask, _ = draw_inputs(rows, DTYPES[seed % 7 % len(DTYPES)], seed)
        given_exact = {"exact": exact} if spec.needs_exact else {}
        given_exact |= {} if spec.top is None else {"remainder": ref}
        check("penalty", kl_penalty(spec, logp, ref, mask, **given_exact), mask)

    run()
