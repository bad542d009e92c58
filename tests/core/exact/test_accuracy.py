"""KL, log-probs and gradients against float64 on the same inputs, from 1e-7 to 10 nats.

Promises: KL to 1e-5 wherever it is at least 1e-5 nats, norm-wise over rows; gradients to 1e-4 in float32 and to the
rounding of the result in 16 bits, 0.5 %. Measured errors have to stay below half of that, in 16 bits below half of what
the rounding leaves. ``test_capabilities`` measures the same cases with every instruction set of the processor.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl
from kl_plugins.kernels.exact import eager
from kl_plugins.kernels.exact.statistics import Options, Rows, Upstream, needs_float64
from tests.core.exact.accuracy import CASES, DTYPES, GRID, ROOM, Case, grid, measure, shifted
from tests.core.exact.support import make_rows, textbook


def check(name: str, case: Case, backend: str = "eager") -> None:
    for found in measure(name, case, backend):
        assert found.error < ROOM * found.promise, f"{found}: {found.ratio:.2f} of the promise"


@pytest.mark.parametrize("name", CASES)
def test_every_case(name: str) -> None:
    check(name, CASES[name])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936, 256_000])
@pytest.mark.parametrize(("dtype", "std", "distance"), GRID)
def test_everything(backend: str, vocabulary: int, dtype: torch.dtype, std: float, distance: float) -> None:
    check(f"{backend}, vocabulary {vocabulary}", grid(dtype, std, distance, 16, vocabulary), backend)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CASES if "std" not in name and "vocabulary" not in name])
def test_every_case_that_is_not_of_the_grid_compiled(name: str) -> None:
    check(name, CASES[name], "compiled")


def test_the_range_of_divergences_is_what_it_is_said_to_be() -> None:
    means = []
    for distance in (8.0, 0.0003):
        case = grid(torch.float32, 1.0, distance)
        check(f"distance {distance}", case)
        means.append(float(textbook(*case.rows()).kl.mean()))
    assert means[0] > 5
    assert means[1] < 1e-7


def test_rows_with_a_common_offset_may_be_written_over_their_logits() -> None:
    """Their float64 gradient reads the logits again, which must still be there."""
    plain, far = shifted(0.0), shifted(200.0)
    logits, labels = plain.logits.repeat(2, 1), plain.labels.repeat(2)
    ref_logits = torch.cat([plain.ref_logits, far.ref_logits])
    options, rows = Options(), Rows(logits, ref_logits, labels)
    statistics = eager.forward(rows, options)
    assert needs_float64(statistics).tolist() == [False] * 48 + [True] * 48
    given = (statistics, Upstream(torch.ones(96), torch.zeros(96)))
    wanted = eager.backward(rows, *given, options)
    written = logits.clone()
    over_it = rows._replace(logits=written)
    assert eager.backward(over_it, *given, options._replace(tile_bytes=50_000), written) is written
    torch.testing.assert_close(written, wanted, rtol=1e-5, atol=1e-12)


def test_identical_policies() -> None:
    rows = make_rows(8, 1000)
    logits = rows.logits.clone().requires_grad_()
    found = exact_kl(logits, rows.logits, rows.labels)
    found.kl.sum().backward()
    assert torch.equal(found.kl, torch.zeros(8))
    assert torch.equal(found.logp, found.ref_logp)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_never_negative(dtype: torch.dtype) -> None:
    for seed, distance in itertools.product(range(6), (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)):
        rows = make_rows(32, 257, std=1.0 + seed, distance=distance, dtype=dtype, seed=seed)
        kl: Tensor = exact_kl(*rows).kl
        assert float(kl.min()) >= 0
