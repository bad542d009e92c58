"""KL, log-probs and gradients against float64 on the same inputs, from 1e-7 to 10 nats.

Targets: KL to 1e-5 wherever it is at least 1e-5 nats, norm-wise over rows; gradients to 1e-4 in float32 and to the
rounding of the result in 16 bits, 0.5 %.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl
from tests.core.exact.support import Rows, make_rows, norm_error, textbook

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISTANCES = (4.0, 0.5, 0.1, 0.03, 0.0045, 0.0005)
CASES = list(itertools.product(DTYPES, (1.0, 4.0, 8.0), DISTANCES))


def check(rows: Rows, backend: str, **options: float) -> float:
    """Compare everything; the mean KL of the rows."""
    logits = rows.logits.detach().requires_grad_()
    found = exact_kl(logits, rows.ref_logits, rows.labels, backend=backend, **options)
    exact = rows.logits.detach().double().requires_grad_()
    wanted = textbook(exact, rows.ref_logits, rows.labels, **options)
    mean = float(wanted.kl.detach().mean())
    assert norm_error(found.kl.detach(), wanted.kl.detach()) < (1e-5 if mean >= 1e-5 else 1e-4), mean
    for name in ("logp", "ref_logp"):
        torch.testing.assert_close(
            getattr(found, name).detach().double(), getattr(wanted, name).detach(), rtol=1e-6, atol=3e-6
        )
    # A loss scale, as float16 is trained with: its numbers end at 6e-8.
    scale = 2.0**12 if rows.logits.dtype == torch.float16 and mean < 0.1 else 1.0
    weight = torch.linspace(0.5, 1.5, len(rows.labels))
    for output, exactly in ((found.kl, wanted.kl), (found.logp, wanted.logp)):
        (grad,) = torch.autograd.grad((output * weight).sum() * scale, logits, retain_graph=True)
        (right,) = torch.autograd.grad((exactly * weight).sum() * scale, exact, retain_graph=True)
        assert norm_error(grad, right) < (1e-4 if grad.dtype == torch.float32 else 5e-3), mean
    return mean


@pytest.mark.parametrize(("dtype", "std", "distance"), CASES)
def test_eager(dtype: torch.dtype, std: float, distance: float) -> None:
    check(make_rows(48, 1000, std=std, distance=distance, dtype=dtype), "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [0.1, 0.0045])
def test_large_vocabularies(dtype: torch.dtype, distance: float) -> None:
    check(make_rows(8, 151_936, distance=distance, dtype=dtype), "eager")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936, 256_000])
@pytest.mark.parametrize(("dtype", "std", "distance"), CASES)
def test_everything(backend: str, vocabulary: int, dtype: torch.dtype, std: float, distance: float) -> None:
    check(make_rows(16, vocabulary, std=std, distance=distance, dtype=dtype), backend)


def test_the_range_of_divergences_is_what_it_is_said_to_be() -> None:
    means = [check(make_rows(48, 1000, std=1.0, distance=distance), "eager") for distance in (6.0, 0.0004)]
    assert means[0] > 5
    assert means[1] < 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.9, "softcap": 30.0, "ref_softcap": 30.0},
        {"softcap": 12.0},
        {"ref_softcap": 12.0, "temperature": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("distance", [1.0, 0.0045])
def test_temperature_and_soft_caps(options: dict[str, float], distance: float) -> None:
    check(make_rows(48, 1000, distance=distance), "eager", **options)


@pytest.mark.parametrize("offset", [20.0, -20.0, 200.0])
def test_a_label_that_is_an_outlier(offset: float) -> None:
    """The sums around such a label lose all digits of a small KL: these rows are computed again."""
    rows = make_rows(48, 1000, std=1.0, distance=0.01)
    least = rows.logits.argmin(-1, keepdim=True)
    ref_logits = rows.ref_logits.scatter(-1, least, rows.logits.gather(-1, least) - 20.0)
    ref_logits = torch.where(rows.ref_logits == ref_logits, ref_logits + offset, ref_logits)
    check(Rows(rows.logits, ref_logits, least[:, 0]), "eager")


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
