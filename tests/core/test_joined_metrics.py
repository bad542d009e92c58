"""Metrics joined over micro-batches and ranks are those of one large batch."""

from __future__ import annotations

import pytest
import torch

from kl_plugins import KLSpec, kl_term
from kl_plugins.adapters.metrics import Accumulator, joined, sums_and_maxima, warn_if_floored
from kl_plugins.adapters.trl.ranks import Window
from kl_plugins.kernels.backend import say_once
from kl_plugins.metrics import REDUCTIONS

SPEC = KLSpec.parse("k2@loss/is:token/floor:0.9/cap:3")
LENGTHS = (7, 1, 4, 0, 6, 2, 5, 3)


def batch(dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(1)

    def log_probs(scale: float) -> torch.Tensor:
        return (-2.0 + scale * torch.randn(len(LENGTHS), 7, generator=random, dtype=torch.float64)).to(dtype)

    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return {"logp": log_probs(0.3), "ref_logp": log_probs(0.5), "old_logp": log_probs(0.6)}, mask


def metrics(rows: slice | list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors, mask = batch()
    part = {name: value[rows] for name, value in tensors.items()}
    found = kl_term(SPEC, part["logp"], part["ref_logp"], mask[rows], old_logp=part["old_logp"]).metrics
    return found, mask[rows]


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[0], [1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)]])
def test_however_a_batch_is_split(parts: list[list[int]]) -> None:
    whole, _ = metrics(slice(None))
    accumulator = Accumulator()
    for rows in parts:
        accumulator.add(*metrics(rows), 0.25)
    found = accumulator.total()
    assert found.keys() == whole.keys() | {"kl/beta"}
    assert found.pop("kl/beta") == 0.25
    assert found == pytest.approx({key: value.item() for key, value in whole.items()}, rel=1e-9, abs=1e-12)
    assert accumulator.total() == {}


def test_ranks_join_by_sums_and_maxima() -> None:
    """What a collective does to the packed tensors: sums are added, the largest are taken."""
    whole, _ = metrics(slice(None))
    ranks = []
    for rows in ([0, 3], [1, 2, 4, 5, 6, 7]):
        accumulator = Accumulator()
        accumulator.add(*metrics(rows), 0.5)
        ranks.append(accumulator)
    packed = [rank.packed() for rank in ranks]
    assert all(part is not None for part in packed)
    sums = torch.stack([part[0] for part in packed if part]).sum(0)
    maxima = torch.stack([part[1] for part in packed if part]).amax(0)
    found = ranks[0].total((sums, maxima))
    assert {key: found[key] for key in whole} == pytest.approx(
        {k: v.item() for k, v in whole.items()}, rel=1e-9, abs=1e-12
    )


def test_a_plain_mean_of_parts_would_be_wrong() -> None:
    """The control: parts of unequal size, averaged without weights, give other numbers."""
    whole, _ = metrics(slice(None))
    parts = [metrics(rows)[0] for rows in ([0], [1, 2, 3], [4, 5, 6, 7])]
    for key, how in REDUCTIONS.items():
        if key not in whole or key in ("kl/active", "kl/dead_frac"):
            continue
        plain = sum(part[key].item() for part in parts) / 3
        assert plain != pytest.approx(whole[key].item(), rel=1e-3), (key, how)


def test_nothing_at_all() -> None:
    found, mask = metrics([3])
    assert not mask.any()
    result = joined(*({key: value.item() for key, value in part.items()} for part in sums_and_maxima(found, mask, 1.0)))
    assert result == {**dict.fromkeys(found, 0.0), "kl/active": 1.0, "kl/beta": 1.0}


def test_huge_numbers_stay_finite() -> None:
    logp = torch.tensor([[-300.0, 0.0, -1.0]], dtype=torch.float64)
    spec = KLSpec.parse("chi2@loss/is:token/bound:600")
    found = kl_term(spec, logp, torch.zeros_like(logp), torch.ones(1, 3), old_logp=logp - 600).metrics
    accumulator = Accumulator()
    accumulator.add(found, torch.ones(1, 3), 1.0)
    accumulator.add(found, torch.ones(1, 3), 1.0)
    assert all(value == value and abs(value) < float("inf") for value in accumulator.total().values())


@pytest.mark.parametrize(
    ("spec", "share", "said"),
    [
        ("k2@loss/is:token/floor:0.5", 0.51, True),
        ("k2@loss/is:token/floor:0.5", 0.5, False),
        ("k2@loss/is:token/floor:1", 0.9, False),  # half of all weights are below 1 on fresh data as well
        ("k2@loss/is:token", 0.9, False),
    ],
)
def test_many_floored_weights_are_said_once(
    spec: str, share: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    for _ in range(2):
        warn_if_floored(KLSpec.parse(spec), {"kl/floor_frac": share})
    assert len(caplog.messages) == said
    assert all("kl/floor_frac > 0.5" in message and "fresher data" in message for message in caplog.messages)


def test_a_window_of_trls_log_ends_where_the_next_begins() -> None:
    window, log = Window(), {}
    one, other = (
        [{key: value.item() for key, value in part.items()} for part in sums_and_maxima(*metrics(rows), 1.0)]
        for rows in ([0, 1], [2])
    )
    assert window.add(log, *one) == {}
    assert window.add(log, *other) == {}  # the same window
    whole = {key: values[0] for key, values in log.items()}
    log.clear()  # TRL has logged
    assert window.add(log, *one) == whole
