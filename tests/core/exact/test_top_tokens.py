"""The most probable tokens: those of ``torch.topk``, for every dtype, size and number, with and without NumPy."""

import pytest
import torch
from torch import Tensor

from kl_plugins.top_k import top_tokens

INF, NAN = float("inf"), float("nan")
VOCABULARIES = [1, 7, 31, 32, 2048, 2050, 4099, 20003]


def without_numpy(self: Tensor) -> None:
    raise RuntimeError("Numpy is not available")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("numpy", [True, False])
def test_they_are_the_largest(
    vocabulary: int, dtype: torch.dtype, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many equal numbers in 16 bits, and for rows that are far apart in memory."""
    if not numpy:
        monkeypatch.setattr(Tensor, "numpy", without_numpy)
    torch.manual_seed(0)
    logits = torch.randn(50, vocabulary + 1).mul(3).to(dtype)
    for given in (logits[:, 1:], logits[:, 1:].contiguous(), logits[:, 1:].abs(), -logits[:, 1:].abs()):
        for k in (1, 5, 8, 64):
            ids = top_tokens(given[:, None], k)[:, 0]
            count = min(k, vocabulary)
            assert ids.shape == (50, count)
            assert ids.dtype == torch.int64
            assert all(len(set(row)) == count for row in ids.tolist())
            assert torch.equal(given.gather(-1, ids), given.topk(count, -1)[0])


def test_neighbouring_numbers_keep_their_order() -> None:
    """Numbers that differ in their last bit; for float64 this is a bit that a float32 does not have."""
    for dtype in (torch.float32, torch.float64):
        for start in (1.5, -1.5, 1e-40, -1e-40):
            values = [torch.tensor(start, dtype=dtype)]
            for _ in range(99):
                values.append(torch.nextafter(values[-1], torch.tensor(INF, dtype=dtype)))
            logits = torch.stack(values)
            order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
            assert torch.equal(top_tokens(logits[order], 5), order.argsort()[-5:].flip(0))


@pytest.mark.parametrize("numpy", [True, False])
def test_infinities(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the model cannot choose come last, and each of them at most once."""
    if not numpy:
        monkeypatch.setattr(Tensor, "numpy", without_numpy)
    logits = torch.full((3, 500), -INF)
    logits[0, [7, 400, 31]] = torch.tensor([1.0, 3.0, 2.0])
    logits[1, [99, 98]] = torch.tensor([INF, 5.0])
    ids = top_tokens(logits, 8)
    assert ids[0, :3].tolist() == [400, 31, 7]
    assert ids[1, :2].tolist() == [99, 98]
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < 500


@pytest.mark.parametrize("numpy", [True, False])
def test_a_nan_is_kept(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN must not be left out in silence."""
    if not numpy:
        monkeypatch.setattr(Tensor, "numpy", without_numpy)
    logits = torch.linspace(0, 1, 300)[None].clone()
    logits[0, 12] = NAN
    assert 12 in top_tokens(logits, 8)[0].tolist()


def test_no_rows_and_many_dimensions() -> None:
    assert top_tokens(torch.zeros(0, 3, 500), 4).shape == (0, 3, 4)
    assert top_tokens(torch.zeros(500), 4).shape == (4,)
    logits = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_tokens(logits, 4), logits.topk(4, -1).indices)
    assert torch.equal(top_tokens(logits.mT.contiguous().mT, 4), logits.topk(4, -1).indices)


def test_within_vmap_and_compile() -> None:
    logits = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    expected = logits.topk(4, -1).indices

    def ids(rows: Tensor) -> Tensor:
        return top_tokens(rows, 4)

    assert torch.equal(torch.vmap(ids)(logits), expected)
    assert torch.equal(torch.compile(ids, backend="eager")(logits), expected)


def test_the_logits_do_not_change() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for given in (logits, logits.clone().requires_grad_()):
        before = given.detach().clone()
        top_tokens(given, 4)
        assert torch.equal(given, before)


def test_a_number_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        top_tokens(torch.zeros(3, 2), 0)
