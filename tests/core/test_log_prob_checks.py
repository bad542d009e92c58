"""Log-probs that are not finite: counted on each rank, summed, and refused on all of them with one message."""

from __future__ import annotations

import pytest
import torch

from kl_plugins import KLSpec
from kl_plugins.adapters.log_probs import LogProbError, count_not_finite, finite_or, require_finite, used

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[True, True, False], [True, False, False]])


def log_probs(*bad: float) -> torch.Tensor:
    """(2, 3) with the bad values on response tokens, and NaN outside of the mask."""
    found = torch.full((2, 3), -1.0).masked_fill(~MASK, NAN)
    for position, value in zip(((0, 0), (0, 1), (1, 0)), bad, strict=False):
        found[position] = value
    return found


def test_counts_by_hand_and_over_ranks() -> None:
    given = {"policy": log_probs(), "reference": log_probs(NAN, INF), "sampler": log_probs(-INF, NAN, INF)}
    counts = count_not_finite(given, MASK)
    assert counts.tolist() == [0, 2, 0, 3, 3]
    assert counts.dtype == torch.int64
    with pytest.raises(
        LogProbError, match=r"reference on 4 and the log-probs of the sampler on 6 of 6 response tokens"
    ):
        require_finite(counts + counts, KLSpec.parse("k2@loss/is:token"))
    require_finite(count_not_finite({"policy": log_probs()}, MASK), KLSpec.parse("k2@loss"))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("policy", "learning rate"),
        ("reference", "reference model"),
        ("old policy", "learning rate"),
        ("sampler", "processed_logprobs"),
    ],
)
def test_the_message_says_what_where_and_what_to_do(name: str, advice: str) -> None:
    with pytest.raises(LogProbError) as caught:
        require_finite(count_not_finite({name: log_probs(NAN)}, MASK), KLSpec.parse("k2@loss/is:token"))
    for words in (f"the log-probs of the {name} on 1 of 3", "k2@loss/is:token", "before the update", advice):
        assert words in str(caught.value)


def test_only_what_enters_the_regulariser_counts() -> None:
    policy, reference, old, sampler = (log_probs() for _ in range(4))
    given = {"policy": policy, "reference": reference, "old": old, "sampler": sampler}
    assert set(used(KLSpec.parse("k2@loss"), "unused", **given)) == {"policy", "reference"}
    assert set(used(KLSpec.parse("k2@loss/is:token"), "sampler", **given)) == {"policy", "reference", "sampler"}
    assert set(used(KLSpec.parse("k2@loss/is:token"), "old", **given)) == {"policy", "reference", "old policy"}
    assert set(used(KLSpec.parse("k2@loss/is:token"), "current", **given)) == {"policy", "reference"}


def test_metrics_take_another_log_prob_in_its_place() -> None:
    assert finite_or(None, log_probs()) is None
    found = finite_or(log_probs(NAN, INF, -INF), torch.full((2, 3), -3.0))
    assert found is not None
    assert found[MASK].tolist() == [-3.0, -3.0, -3.0]
