"""The controller that all hosts share: whose coefficient counts, one definition of n, checkpoints."""

from __future__ import annotations

import logging

import pytest
import torch

from kl_plugins import KLSpec
from kl_plugins.adapters.checkpoints import SpecChangedError, record, resumed
from kl_plugins.adapters.controller import BetaChangedError, Controller
from kl_plugins.controllers import update


def controller(option: str | None, base: float = 0.5) -> Controller:
    spec = KLSpec.parse("k2@loss" + (f"/beta:{option}" if option else ""))
    return Controller(spec.beta, base, "trainer.beta")


def test_without_a_schedule_the_host_decides() -> None:
    control = controller(None)
    assert [control.beta(value) for value in (0.5, 0.1, 0.0)] == [0.5, 0.1, 0.0]
    control.observe(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2))
    control.step(None)
    assert control.beta(0.3) == 0.3


def test_with_a_schedule_a_change_of_the_host_is_an_error() -> None:
    control = controller("linear-0.5-0-10")
    assert control.beta(0.5) == 0.5
    with pytest.raises(BetaChangedError, match=r"trainer\.beta was changed from 0\.5 to 0\.1 .* beta:linear"):
        control.beta(0.1)


def test_n_counts_responses_that_have_a_token_over_all_ranks() -> None:
    """Three responses here, one without a token; the collective doubles everything, as a second equal rank would."""
    control = controller("adaptive-0.5-100")
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    logp = torch.full((3, 3), 0.3)
    control.observe(logp, torch.zeros(3, 3), mask)
    control.observe(logp, torch.zeros(3, 3), mask)
    before = control.saved()
    control.step(lambda sums: 2 * sums)
    u = torch.tensor(0.3)
    k3 = float(torch.exp(-u) - 1 + u)
    assert control.saved()["beta"] == pytest.approx(update(before, k3, 8)["beta"], rel=1e-6)
    assert control.saved()["beta"] != pytest.approx(update(before, k3, 6)["beta"], rel=1e-6)
    control.step(lambda sums: pytest.fail("nothing was observed"))


def test_a_checkpoint_restores_the_state_and_a_missing_one_is_said(caplog: pytest.LogCaptureFixture) -> None:
    first, second = controller("linear-0.5-0-10"), controller("linear-0.5-0-10")
    first.observe(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    first.step(None)
    second.restore(first.saved())
    assert second.beta(0.5) == first.beta(0.5) == 0.45
    with caplog.at_level(logging.WARNING):
        second.restore(None)
    assert "starts again at beta 0.5" in caplog.text
    assert second.beta(0.5) == 0.5


def test_a_run_resumes_under_its_own_spec(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    spec, other = KLSpec.parse("k2@loss/is:token/floor:0.5"), KLSpec.parse("default")
    assert resumed(record(spec, {"beta": 1.0}), other) == {"beta": 1.0}  # one spec, written in two ways
    changed = KLSpec.parse("k3@loss")
    said = r"under k2@loss/is:token/floor:0.5.* with k3@loss.*KL_PLUGINS_ALLOW_SPEC_CHANGE"
    with pytest.raises(SpecChangedError, match=said):
        resumed(record(spec), changed)
    monkeypatch.setenv("KL_PLUGINS_ALLOW_SPEC_CHANGE", "1")
    with caplog.at_level(logging.WARNING):
        assert resumed(record(spec), changed) is None
        assert resumed(None, changed) is None
    assert "changes from k2@loss/is:token/floor:0.5 to k3@loss" in caplog.text
    assert "written without kl-plugins" in caplog.text
