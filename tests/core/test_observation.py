"""The text ``observe``, and the measurement of a spec that is not applied."""

from __future__ import annotations

import pytest
import torch

from kl_plugins import KLSpec, KLSpecError, kl_penalty, kl_term
from kl_plugins.adapters.checkpoints import ALLOW_VARIABLE, SpecChangedError, record
from kl_plugins.adapters.metrics import Accumulator
from kl_plugins.adapters.observe import measured, require_unregularised
from kl_plugins.metric_names import OBSERVATION
from kl_plugins.metrics import penalty_metrics
from kl_plugins.observed import OBSERVED, observed
from kl_plugins.report.run import meaning
from kl_plugins.spec.observation import Observation, looks_like_observation
from tests.support.core.tensors import batch as make_batch


@pytest.mark.parametrize(
    ("text", "native", "spec", "probe"),
    [
        ("observe", None, None, None),
        ("observe:k2@loss/is:token", None, "k2@loss/is:token", None),
        ("observe:default/probe:7", None, "k2@loss/is:token/floor:0.5", 7),
        ("observe/probe:100", None, None, 100),
        ("k3/observe", "k3", None, None),
        ("low_var_kl+/observe:k1@reward/probe:1", "low_var_kl+", "k1@reward", 1),
        ("observe:exact@loss/top/probe:2", None, "exact@loss/top:16/draws:8", 2),
        ("k3/observe:exact@loss/top:8/is:token", "k3", "exact@loss/top:8/is:token", None),
        ("k3/observe:k1@loss", "k3", "k1@loss/allow:biased", None),  # nothing trains under it
    ],
)
def test_texts(text: str, native: str | None, spec: str | None, probe: int | None) -> None:
    assert looks_like_observation(text)
    found = Observation.parse(text)
    assert (found.native, found.probe, found.named) == (native, probe, spec is not None)
    assert found.spec == (None if spec is None else KLSpec.parse(spec))
    assert Observation.parse(str(found)) == found


@pytest.mark.parametrize("text", ["k3", "low_var_kl+", "k2@loss", "default", "observed", "observer/k2", "", None, 3])
def test_words_and_specs_are_no_observations(text: object) -> None:
    assert not looks_like_observation(text)


@pytest.mark.parametrize(
    ("text", "part", "says"),
    [
        ("k2@loss/observe", "k2@loss", "observe:k2@loss"),
        ("default/observe", "default", "observe:default"),
        ("observe/floor:0.5", "floor:0.5", "belongs to no spec"),
        ("observe:k2@los", "los", "did you mean: loss"),
        ("observe:k2@loss/probe", "probe", "without a number"),
        ("observe/probe:0", "probe:0", "at least 1"),
        ("observe/probe:1.5", "probe:1.5", "at least 1"),
        ("observe:k2@loss/probe:3/is:token", "probe:3", "stands at the end"),
        ("observe:exact@advantage/top", "exact@advantage/top", "did you mean: observe:exact@loss/top"),
        ("observe:k2@loss/horizon:sequence/future:exact", "k2@loss/horizon:sequence/future:exact", "exact@loss/top"),
        ("observe:exact@loss", "exact@loss", "did you mean: observe:exact@loss/top"),
        ("observe:k2@loss/beta:linear-1-0-10", "beta:linear-1-0-10", "nothing to control"),
        ("/observe", "/", "before 'observe'"),
    ],
)
def test_errors_name_the_part(text: str, part: str, says: str) -> None:
    with pytest.raises(KLSpecError) as caught:
        Observation.parse(text)
    assert text[caught.value.start : caught.value.end] == part
    assert says in str(caught.value)


def test_probes_come_every_n_steps() -> None:
    observation = Observation.parse("observe/probe:3")
    assert [step for step in range(10) if observation.probes(step)] == [3, 6, 9]
    assert not any(Observation.parse("observe").probes(step) for step in range(10))


@pytest.mark.parametrize(
    "text",
    [
        "k2@loss",
        "k3@loss/is:token/floor:0.5",
        "exact@loss/top:4/is:decision/horizon:sequence",
        "k1@advantage",
        "k1@reward",
    ],
)
def test_metrics_are_those_of_the_applied_spec(text: str) -> None:
    batch, spec = make_batch().leaves(), KLSpec.parse(text)
    logp, given = batch.logp, batch.keywords(spec)
    found = observed(spec, logp, batch.ref, batch.mask, **given)
    if spec.placement == "loss":
        wanted = kl_term(spec, logp, batch.ref, batch.mask, **given).metrics
    else:
        penalty = kl_penalty(spec, batch.old, batch.ref, batch.mask)
        wanted = penalty_metrics(penalty, logp, batch.ref, batch.old, batch.mask)
    assert found.metrics == {**wanted, OBSERVED: 1.0}
    assert not any(value.requires_grad for value in (*found.metrics.values(), found.coefficient))


def test_what_is_not_finite_is_left_out_and_shown() -> None:
    batch, spec = make_batch(), KLSpec.parse("k2@loss/is:token/behaviour:old")
    mask = torch.ones_like(batch.mask, dtype=torch.bool)
    logp, ref, old = (part.detach().clone() for part in (batch.logp, batch.ref, batch.old))
    sound = torch.ones_like(mask)
    for place, tensor in enumerate((logp, ref, old)):
        tensor[0, place] = (torch.nan, torch.inf, -torch.inf)[place]
        sound[0, place] = False
    found = observed(spec, logp, ref, mask, old_logp=old)
    wanted = kl_term(spec, batch.logp, batch.ref, sound, old_logp=batch.old).metrics
    assert found.metrics[OBSERVED] == pytest.approx(1 - 3 / mask.sum().item())
    assert {key: value.item() for key, value in found.metrics.items() if key != OBSERVED} == pytest.approx(
        {key: value.item() for key, value in wanted.items()}
    )


def test_states_without_a_finite_kl_are_left_out() -> None:
    batch, spec = make_batch(), KLSpec.parse("exact@loss/top:4")
    mask = torch.ones_like(batch.mask, dtype=torch.bool)
    exact, remainder, sound = batch.exact.clone(), batch.remainder.clone(), mask.clone()
    exact[0, 0], remainder[0, 1] = torch.nan, torch.inf
    sound[0, :2] = False
    found = observed(spec, batch.logp, batch.ref, mask, exact=exact, remainder=remainder)
    wanted = kl_term(spec, batch.logp, batch.ref, sound, **batch.exact_keywords(spec)).metrics
    assert torch.equal(found.kept, sound)
    assert found.metrics["kl/exact"] == pytest.approx(wanted["kl/exact"].item())
    assert not observed(spec, batch.logp, batch.ref, mask, exact=batch.exact).kept.any()


def test_without_the_log_probs_of_its_weight_a_spec_is_computed_on_no_token() -> None:
    batch = make_batch()
    found = observed(KLSpec.parse("k2@loss/is:token/behaviour:sampler"), batch.logp, batch.ref, batch.mask)
    assert found.metrics[OBSERVED] == 0
    assert not found.kept.any()


def test_the_share_reaches_the_log() -> None:
    batch, accumulator = make_batch(), Accumulator()
    for size in (1, batch.mask.shape[0]):
        logp = batch.logp[:size].clone()
        if size == 1:
            logp[:] = torch.nan
        found = measured(KLSpec.parse("k2@loss"), logp, batch.ref[:size], batch.mask[:size], old=None, sampler=None)
        accumulator.add(found.metrics, found.kept, 0.25)
    total = accumulator.total()
    assert total["kl/observed"] == 0.5  # one micro-batch without any, one with all
    whole = kl_term(KLSpec.parse("k2@loss"), batch.logp, batch.ref, batch.mask).metrics
    assert total["kl/value"] == pytest.approx(whole["kl/value"].item())
    assert total["kl/beta"] == 0.25


def test_a_checkpoint_of_a_spec_is_not_resumed_under_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    observation = Observation.parse("k3/observe")
    require_unregularised(None, observation)
    require_unregularised({}, observation)
    with pytest.raises(SpecChangedError, match=r"under k2@loss, .* k3/observe, which observes"):
        require_unregularised(record(KLSpec.parse("k2@loss")), observation)
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    require_unregularised(record(KLSpec.parse("k2@loss")), observation)


@pytest.mark.parametrize("key", OBSERVATION)
def test_every_metric_has_a_meaning_on_the_page(key: str) -> None:
    assert meaning(key) == OBSERVATION[key]
