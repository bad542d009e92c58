"""What is checked in each situation, for any host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kl_plugins.metrics import REDUCTIONS
from tests.contract.driver import Driver, Fault, Outcome, Request, Sampled

NOT_FINITE = (math.nan, math.inf, -math.inf)

BY_SAMPLER = "k2@loss/is:token/behaviour:sampler"
BY_OLD = "k2@loss/is:token/behaviour:old"


def _stopped(outcome: Outcome, *words: str) -> None:
    """All ranks have stopped, with one message that holds the words, and nothing was updated."""
    first = outcome.errors[0]
    assert first is not None, outcome
    for word in (*words, "kl-plugins"):
        assert word in first, first
    assert all(error is not None and _message(error) == _message(first) for error in outcome.errors), outcome.errors
    assert not outcome.changed


def _message(error: str) -> str:
    """The text from our own name on: hosts put where an error came from before it, and their advice behind it."""
    return error[error.index("kl-plugins") :].split("\n")[0]


def _went_on(outcome: Outcome) -> None:
    assert outcome.errors == (None,) * len(outcome.errors), outcome.errors
    assert outcome.metrics
    for metrics in outcome.metrics:
        assert metrics
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert outcome.gradient is None or bool(outcome.gradient.isfinite().all())


def not_finite(whose: str, spec: str) -> Callable[[Driver], None]:
    """NaN, +inf and -inf stop the update, also where a controller would have observed them."""

    def check(driver: Driver) -> None:
        cases = [*((spec, value) for value in NOT_FINITE), (f"{spec}/beta:dual-0.1-0.01", math.nan)]
        for text, value in cases:
            outcome = driver.update(Request(text, Fault(whose, value)))
            _stopped(outcome, whose, "not finite", "1 of", text)

    return check


def not_finite_on_one_rank(driver: Driver) -> None:
    """The other rank has nothing wrong, and stops with the same words all the same."""
    for fault, spec in (
        (Fault("sampler", math.nan, rank=1), BY_SAMPLER),
        (Fault("policy", math.nan, rank=0), "k2@loss"),
        (Fault("reference", -math.inf, rank=1), "k2@loss"),
    ):
        outcome = driver.update(Request(spec, fault, ranks=2))
        assert len(outcome.errors) == 2
        _stopped(outcome, fault.whose, "1 of")


def not_finite_and_unused(driver: Driver) -> None:
    """What no weight divides by feeds metrics alone; these stay finite, and the gradient is that of sound data."""
    sound = driver.update(Request("k2@loss"))
    for whose, value in itertools.product(("sampler", "old"), NOT_FINITE):
        if driver.host == "openrlhf" and whose == "old" and math.isnan(value):
            continue  # it makes OpenRLHF's own policy loss NaN; infinities do not, because their log-ratio is clamped
        outcome = driver.update(Request("k2@loss", Fault(whose, value)))
        if driver.host == "trl" and whose == "old" and value != math.inf:
            outcome = replace(outcome, gradient=None)  # TRL's own policy loss divides by it, with or without kl-plugins
        _went_on(outcome)
        if sound.gradient is not None and outcome.gradient is not None and whose == "sampler":
            torch.testing.assert_close(outcome.gradient, sound.gradient, rtol=1e-5, atol=1e-7)


def not_finite_in_scores(driver: Driver) -> None:
    """A penalty that has no value stops the run before the advantages are used."""
    for whose in ("policy", "reference"):
        outcome = driver.score("k1@advantage", Fault(whose, math.nan))
        _stopped(outcome, whose, "not finite")
    _went_on(driver.score("k1@advantage"))


def empty_mask(driver: Driver) -> None:
    """No response token at all: no KL, no error."""
    outcome = driver.update(Request("k2@loss/is:token", empty=(0,)))
    if driver.host == "openrlhf":  # alone it divides its metrics by the tokens of a micro-batch, and ends as well
        alone = driver.update(Request(None, empty=(0,)))
        assert outcome.errors == alone.errors == ("float division by zero",)
        return
    _went_on(outcome)
    assert outcome.metrics[-1]["kl/value"] == 0
    assert outcome.metrics[-1]["kl/active"] == 1


def empty_rank(driver: Driver) -> None:
    """The other rank's tokens count, and only they."""
    outcome = driver.update(Request("k2@loss/is:token", empty=(1,), ranks=2))
    _went_on(outcome)
    assert outcome.metrics[-1]["kl/value"] > 0
    assert outcome.metrics[-1]["kl/active"] == 1


def split(driver: Driver) -> None:
    """One process, two processes, and several micro-batches log the same numbers for the same batch."""
    spec = "k2@loss/is:token"
    whole = driver.update(Request(spec)).metrics[-1]
    assert set(REDUCTIONS) - {"kl/exact"} <= set(whole)
    assert whole["kl/ess"] < 0.999
    assert whole["kl/coef/std"] > 0
    for request in (Request(spec, micro_batches=2), Request(spec, ranks=2)):
        found = driver.update(request).metrics[-1]
        for key in set(REDUCTIONS) - {"kl/exact"}:
            assert found[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-6), (key, request)


def changed_beta(driver: Driver) -> None:
    """The coefficient that a user sets during the run is the one that is used, and the one that is logged."""
    outcome = driver.update(Request("k2@loss", betas=(0.5, 0.25)))
    _went_on(outcome)
    assert [metrics["kl/beta"] for metrics in outcome.metrics] == [0.5, 0.25]
    kept = driver.update(Request("k2@loss", betas=(0.5, 0.5)))
    assert outcome.gradient is not None
    assert kept.gradient is not None
    torch.testing.assert_close(outcome.gradient, kept.gradient / 2, rtol=1e-3, atol=1e-6)


def changed_beta_under_a_schedule(driver: Driver) -> None:
    """Two controls of one coefficient: the run stops instead of ignoring one of them."""
    outcome = driver.update(Request("k2@loss/beta:linear-0.5-0-10", betas=(0.5, 0.25)))
    _stopped(outcome, "changed from 0.5 to 0.25", "beta:linear")


def resume(driver: Driver) -> None:
    """The controller goes on where the checkpoint left it."""
    spec = "k2@loss/beta:linear-0.5-0-10"
    resumed = driver.resume(spec, spec)
    assert resumed.error is None
    assert resumed.saved < 0.5
    assert resumed.beta == pytest.approx(resumed.saved)


def resume_under_another_spec(driver: Driver) -> None:
    """The regulariser does not change in the middle of a run unless the user says so."""
    resumed = driver.resume("k2@loss", "k3@loss")
    assert resumed.error is not None
    for words in ("k2@loss", "k3@loss", "KL_PLUGINS_ALLOW_SPEC_CHANGE"):
        assert words in resumed.error
    assert resumed.intact


def truncated_sampling(driver: Driver) -> None:
    """Receipts show it; products of weights against the sampler are refused, others are not."""
    for sampled, words in (
        (Sampled(top_p=0.9), "top_p 0.9"),
        (Sampled(top_k=20), "top_k 20"),
    ):
        if driver.host == "openrlhf" and sampled.top_k:
            continue  # it has no such setting; tests/openrlhf/test_sampler.py passes it as a launcher of one's own may
        receipt = driver.receipt("k2@loss/is:token", sampled=sampled)
        assert words in receipt.sampling
        assert words in receipt.line()
        assert any("kept probability mass" in caveat for caveat in receipt.caveats)
        for level in ("prefix", "sequence"):
            refusal = driver.refusal(f"k2@loss/is:{level}", sampled=sampled)
            assert words in refusal
            assert "KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS" in refusal
            assert driver.refusal(f"k2@loss/is:{level}/behaviour:old", sampled=sampled) == ""
        assert "KL_PLUGINS" in driver.refusal("k2@loss/horizon:sequence/is:decision", sampled=sampled)
    assert "whole distribution" in driver.receipt("k2@loss/is:token").sampling
    assert driver.refusal("k2@loss/is:prefix") == ""


def raw_log_probs(driver: Driver) -> None:
    """Log-probs of another distribution than the one that was sampled from are no denominator."""
    raw = Sampled(temperature=0.7, raw=True)
    refusal = driver.refusal(BY_SAMPLER, sampled=raw)
    assert "raw" in refusal
    assert "processed_logprobs" in refusal
    assert driver.refusal(BY_OLD, sampled=raw) == ""
    assert driver.refusal(BY_SAMPLER, sampled=Sampled(raw=True)) == ""


def behaviour_old_is_said(driver: Driver) -> None:
    """The caveat is there whether old log-probs were asked for or taken by default."""
    for spec, sampler in ((BY_OLD, True), ("k2@loss/is:token", False)):
        receipt = driver.receipt(spec, sampler=sampler)
        assert receipt.behaviour in ("old", "current")
        assert any("behaviour:old is exact only" in caveat for caveat in receipt.caveats), receipt.caveats
    receipt = driver.receipt("k2@loss")
    assert not any("behaviour:old" in caveat for caveat in receipt.caveats)


def aggregation_is_said(driver: Driver) -> None:
    """The receipt says how per-token terms become one number."""
    receipt = driver.receipt("k2@loss")
    assert receipt.aggregation.startswith(("token sum", "token mean", "sequence mean", "constant"))
    assert receipt.aggregation in receipt.line()


def wrong_key(driver: Driver) -> None:
    """The right place is named."""
    refusal = driver.refusal("k1@reward" if driver.host != "trl" else "k2@loss", wrong_key=True)
    assert "kl-plugins" in refusal
    assert driver.key in refusal


def unused(driver: Driver) -> None:
    """Bit by bit what the host does alone."""
    stock, attached = driver.unused()
    assert stock.errors == attached.errors == (None,) * len(stock.errors)
    assert stock.gradient is not None
    assert attached.gradient is not None
    assert torch.equal(stock.gradient, attached.gradient)
    assert stock.metrics == attached.metrics


def whole_program(driver: Driver) -> None:
    """The program ends with our message, and the checkpoint from before is there."""
    program = driver.program()
    assert program.status != 0
    assert "not finite" in program.output
    assert "kl-plugins" in program.output
    assert program.checkpoints
