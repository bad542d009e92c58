"""The checks of the contract, one per situation, written for any host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kl_plugins.metric_names import LEVELS, OBSERVATION
from kl_plugins.metrics import REDUCTIONS
from tests.contract.driver import BETA, Driver, Fault, Outcome, Request, Sampled

NOT_FINITE = (math.nan, math.inf, -math.inf)

BY_SAMPLER = "k2@loss/is:token/behaviour:sampler"
BY_OLD = "k2@loss/is:token/behaviour:old"


def _stopped(outcome: Outcome, *words: str) -> None:
    """Check that all ranks stopped with the same message, that it contains the words, and that nothing was updated."""
    first = outcome.errors[0]
    assert first is not None, outcome
    for word in (*words, "kl-plugins"):
        assert word in first, first
    assert all(error is not None and _message(error) == _message(first) for error in outcome.errors), outcome.errors
    assert not outcome.changed


def _message(error: str) -> str:
    """Return the first line of an error from the name of kl-plugins on.

    Hosts put the origin of an error before this text, and their own advice after it.
    """
    return error[error.index("kl-plugins") :].split("\n")[0]


def _went_on(outcome: Outcome) -> None:
    assert outcome.errors == (None,) * len(outcome.errors), outcome.errors
    assert outcome.metrics
    for metrics in outcome.metrics:
        assert metrics
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert outcome.gradient is None or bool(outcome.gradient.isfinite().all())


def not_finite(whose: str, spec: str) -> Callable[[Driver], None]:
    """Make a check that NaN, +inf and -inf stop the update, also under a controller that would observe them."""

    def check(driver: Driver) -> None:
        cases = [*((spec, value) for value in NOT_FINITE), (f"{spec}/beta:dual-0.1-0.01", math.nan)]
        for text, value in cases:
            outcome = driver.update(Request(text, Fault(whose, value)))
            _stopped(outcome, whose, "not finite", "1 of", text)

    return check


def not_finite_on_one_rank(driver: Driver) -> None:
    """Check that a rank with valid data stops with the same message as the rank that has the fault."""
    for fault, spec in (
        (Fault("sampler", math.nan, rank=1), BY_SAMPLER),
        (Fault("policy", math.nan, rank=0), "k2@loss"),
        (Fault("reference", -math.inf, rank=1), "k2@loss"),
    ):
        outcome = driver.update(Request(spec, fault, ranks=2))
        assert len(outcome.errors) == 2
        _stopped(outcome, fault.whose, "1 of")


def not_finite_and_unused(driver: Driver) -> None:
    """Check that log-probs which only metrics use do not stop the run.

    The metrics stay finite, and the gradient is the one of data without the fault.
    """
    sound = driver.update(Request("k2@loss"))
    for whose, value in itertools.product(("sampler", "old"), NOT_FINITE):
        if driver.host == "openrlhf" and whose == "old" and math.isnan(value):
            continue  # this NaN makes OpenRLHF's own policy loss NaN; it clamps the log-ratio, so infinities do not
        outcome = driver.update(Request("k2@loss", Fault(whose, value)))
        if driver.host == "trl" and whose == "old" and value != math.inf:
            outcome = replace(outcome, gradient=None)  # TRL's own policy loss also divides by this log-prob
        _went_on(outcome)
        if sound.gradient is not None and outcome.gradient is not None and whose == "sampler":
            torch.testing.assert_close(outcome.gradient, sound.gradient, rtol=1e-5, atol=1e-7)


def not_finite_in_scores(driver: Driver) -> None:
    """Check that a penalty which is not finite stops the run before the advantages are used."""
    for whose in ("policy", "reference"):
        outcome = driver.score("k1@advantage", Fault(whose, math.nan))
        _stopped(outcome, whose, "not finite")
    _went_on(driver.score("k1@advantage"))


def empty_mask(driver: Driver) -> None:
    """Check that a batch without response tokens has a KL of 0 and raises no error."""
    outcome = driver.update(Request("k2@loss/is:token", empty=(0,)))
    if driver.host == "openrlhf":  # it divides its metrics by the number of tokens, with or without kl-plugins
        alone = driver.update(Request(None, empty=(0,)))
        assert outcome.errors == alone.errors == ("float division by zero",)
        return
    _went_on(outcome)
    assert outcome.metrics[-1]["kl/value"] == 0
    assert outcome.metrics[-1]["kl/active"] == 1


def empty_rank(driver: Driver) -> None:
    """Check that the metrics come only from the tokens of the rank that has some."""
    outcome = driver.update(Request("k2@loss/is:token", empty=(1,), ranks=2))
    _went_on(outcome)
    assert outcome.metrics[-1]["kl/value"] > 0
    assert outcome.metrics[-1]["kl/active"] == 1


def split(driver: Driver) -> None:
    """Check that one process, two processes and several micro-batches log the same numbers for the same batch."""
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
    """Check that a coefficient which is set during the run is used and logged."""
    outcome = driver.update(Request("k2@loss", betas=(0.5, 0.25)))
    _went_on(outcome)
    assert [metrics["kl/beta"] for metrics in outcome.metrics] == [0.5, 0.25]
    kept = driver.update(Request("k2@loss", betas=(0.5, 0.5)))
    assert outcome.gradient is not None
    assert kept.gradient is not None
    torch.testing.assert_close(outcome.gradient, kept.gradient / 2, rtol=1e-3, atol=1e-6)


def changed_beta_under_a_schedule(driver: Driver) -> None:
    """Check that the run stops if the user and the spec both control the coefficient."""
    outcome = driver.update(Request("k2@loss/beta:linear-0.5-0-10", betas=(0.5, 0.25)))
    _stopped(outcome, "changed from 0.5 to 0.25", "beta:linear")


def resume(driver: Driver) -> None:
    """Check that the controller of beta continues from the state in the checkpoint."""
    spec = "k2@loss/beta:linear-0.5-0-10"
    resumed = driver.resume(spec, spec)
    assert resumed.error is None
    assert resumed.saved < 0.5
    assert resumed.beta == pytest.approx(resumed.saved)


def resume_under_another_spec(driver: Driver) -> None:
    """Check that the spec cannot change in the middle of a run unless the user allows it."""
    resumed = driver.resume("k2@loss", "k3@loss")
    assert resumed.error is not None
    for words in ("k2@loss", "k3@loss", "KL_PLUGINS_ALLOW_SPEC_CHANGE"):
        assert words in resumed.error
    assert resumed.intact


def truncated_sampling(driver: Driver) -> None:
    """Check that receipts show truncation, and that only products of weights against the sampler are refused."""
    for sampled, words in (
        (Sampled(top_p=0.9), "top_p 0.9"),
        (Sampled(top_k=20), "top_k 20"),
    ):
        if driver.host == "openrlhf" and sampled.top_k:
            continue  # OpenRLHF has no such setting; tests/openrlhf/test_sampler.py tests it with a custom launcher
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
    """Check that raw log-probs are refused as the denominator of a weight if the sampler's distribution differs."""
    raw = Sampled(temperature=0.7, raw=True)
    refusal = driver.refusal(BY_SAMPLER, sampled=raw)
    assert "raw" in refusal
    assert "processed_logprobs" in refusal
    assert driver.refusal(BY_OLD, sampled=raw) == ""
    assert driver.refusal(BY_SAMPLER, sampled=Sampled(raw=True)) == ""


def behaviour_old_is_said(driver: Driver) -> None:
    """Check that the caveat appears whether the spec requests old log-probs or they are used by default."""
    for spec, sampler in ((BY_OLD, True), ("k2@loss/is:token", False)):
        receipt = driver.receipt(spec, sampler=sampler)
        assert receipt.behaviour in ("old", "current")
        assert any("behaviour:old is exact only" in caveat for caveat in receipt.caveats), receipt.caveats
    receipt = driver.receipt("k2@loss")
    assert not any("behaviour:old" in caveat for caveat in receipt.caveats)


def aggregation_is_said(driver: Driver) -> None:
    """Check that the receipt says how the host aggregates per-token terms."""
    receipt = driver.receipt("k2@loss")
    assert receipt.aggregation.startswith(("token sum", "token mean", "sequence mean", "constant"))
    assert receipt.aggregation in receipt.line()


def top_is_said(driver: Driver) -> None:
    """Check that top: is accepted, and that the receipt names the numbers per token and no pass of the reference."""
    assert driver.refusal("exact@loss/top") == ""
    for spec, numbers in (("exact@loss/top:4/is:token", "9 numbers"), ("exact@loss/top", "58 numbers")):
        receipt = driver.receipt(spec)
        assert numbers in receipt.cost
        assert numbers in receipt.line()
        assert "forward pass" not in receipt.cost


def wrong_key(driver: Driver) -> None:
    """Check that the error about a spec in a wrong setting names the right one."""
    refusal = driver.refusal("k1@reward" if driver.host != "trl" else "k2@loss", wrong_key=True)
    assert "kl-plugins" in refusal
    assert driver.key in refusal


def unused(driver: Driver) -> None:
    """Check that an attached but unused kl-plugins changes no bit of the gradient and of the metrics."""
    stock, attached = driver.unused()
    assert stock.errors == attached.errors == (None,) * len(stock.errors)
    assert stock.gradient is not None
    assert attached.gradient is not None
    assert torch.equal(stock.gradient, attached.gradient)
    assert stock.metrics == attached.metrics


def garbage(driver: Driver) -> None:
    """Check that nothing of an update waits for Python's garbage collector."""
    for spec in (BY_SAMPLER, driver.observing(OBSERVED, "/probe:1")):
        outcome = driver.update(Request(spec, betas=(BETA, BETA), garbage=True))
        _went_on(outcome)
        assert outcome.garbage == (), spec


OBSERVED = "k2@loss/is:token/floor:0.5"
"""A spec that the host does not train under in any of these checks."""


def observed(driver: Driver) -> None:
    """Check that observe changes no bit of three updates, and that its metrics are those of the applied spec."""
    steps = (BETA,) * 3
    stock = driver.update(Request(None, betas=steps))
    found = driver.update(Request(driver.observing(OBSERVED, "/probe:2"), betas=steps))
    _unchanged(stock, found)
    applied = driver.update(Request(OBSERVED)).metrics[0]
    for key in set(REDUCTIONS) - {"kl/exact"}:
        # In the first step the weights are the same.
        assert found.metrics[0][key] == pytest.approx(applied[key], rel=1e-6, abs=1e-9), key
    assert [one["kl/observed"] for one in found.metrics] == [1.0] * 3
    assert "kl/observed" not in applied
    probes = [{key: value for key, value in one.items() if key.startswith("kl/probe/")} for one in found.metrics]
    assert not probes[0]
    assert not probes[2]
    assert set(OBSERVATION) - {"kl/observed", "kl/probe/kept_mass"} == set(probes[1])


def observed_native(driver: Driver) -> None:
    """Check that observe alone measures the spec that has the gradient of the host's own KL."""
    found = driver.update(Request(driver.observing("", "/probe:1")))
    own = driver.update(Request("k3@loss"))
    for key in set(REDUCTIONS) - {"kl/exact"}:
        assert found.metrics[0][key] == pytest.approx(own.metrics[0][key], rel=1e-6, abs=1e-9), key
    cosine, ratio = (found.metrics[0][f"kl/probe/host/{name}"] for name in ("cosine", "norm_ratio"))
    assert cosine == pytest.approx(ratio, rel=1e-5)  # the same coefficient, or 0 where a clamp holds the host's value
    clamped = found.metrics[0]["kl/probe/host/dead_frac"] > 0
    assert clamped is (driver.host == "openrlhf")  # whose policy and reference differ from the start
    assert (cosine < 0.999) is clamped
    if not clamped:
        assert found.gradient is not None
        assert own.gradient is not None
        torch.testing.assert_close(found.gradient, own.gradient, rtol=1e-4, atol=1e-6)


def observed_on_two_ranks(driver: Driver) -> None:
    """Check the same with two ranks, and that their metrics are those of the whole batch in one process."""
    text = driver.observing(OBSERVED, "/probe:1")
    stock, found = driver.update(Request(None, ranks=2)), driver.update(Request(text, ranks=2))
    _unchanged(stock, found)
    whole = driver.update(Request(text, micro_batches=2)).metrics[0]
    assert found.metrics[0] == pytest.approx(whole, rel=1e-3, abs=1e-6)
    probe = {key.removeprefix("kl/probe/"): value for key, value in whole.items() if key.startswith("kl/probe/")}
    assert 0.5 < probe["k2/cosine"] < 1  # the same but for the weight
    # The host trains with k3, and in one host some of the batch's log-ratios are beyond a clamp.
    clamped = probe["host/dead_frac"] > 0
    for name in ("cosine", "norm_ratio"):
        assert (probe[f"host/{name}"] != pytest.approx(probe[f"k3/{name}"], rel=1e-4)) is clamped
    assert all(0 < probe[f"{level}/ess"] < 1 for level in LEVELS)
    assert probe["token/weight"] == pytest.approx(whole["kl/weight/mean"])


def observed_not_finite(driver: Driver) -> None:
    """Check that a log-prob which stops a run under the spec does not stop a run that observes it."""
    found = driver.update(Request(driver.observing(BY_SAMPLER), Fault("sampler", math.nan)))
    _unchanged(driver.update(Request(None)), found)
    assert 0 < found.metrics[-1]["kl/observed"] < 1


def observed_is_said(driver: Driver) -> None:
    """Check the receipt of an observation, and the errors about what cannot be observed."""
    receipt = driver.receipt(driver.observing(OBSERVED))
    assert receipt.spec == OBSERVED
    assert "observes, changes nothing" in receipt.line()
    assert f"measures {OBSERVED}" in receipt.line()
    assert "observes" not in driver.receipt(OBSERVED).line()
    assert driver.refusal(driver.observing("k1@reward")) == ""
    assert "'k9'" in driver.refusal(f"k9/observe:{OBSERVED}")


def resume_under_observe(driver: Driver) -> None:
    """Check that a run does not go from a spec to the host's own KL unnoticed."""
    resumed = driver.resume("k2@loss", driver.observing("k2@loss"))
    assert resumed.error is not None
    for words in ("k2@loss", "observes and trains with the host's own KL", "KL_PLUGINS_ALLOW_SPEC_CHANGE"):
        assert words in resumed.error
    assert resumed.intact


def _unchanged(stock: Outcome, found: Outcome) -> None:
    """Check that two outcomes are the same bit by bit, and that both trained."""
    assert stock.errors == found.errors == (None,) * len(stock.errors)
    assert stock.gradient is not None
    assert found.gradient is not None
    assert float(stock.gradient.abs().max()) > 0
    assert torch.equal(stock.gradient, found.gradient)


def whole_program(driver: Driver) -> None:
    """Check that the host's program ends with the message of kl-plugins, and that the earlier checkpoint exists."""
    program = driver.program()
    assert program.status != 0
    assert "not finite" in program.output
    assert "kl-plugins" in program.output
    assert program.checkpoints
