"""A run that was stopped and resumed is the run that was not."""

import json
from pathlib import Path

import pytest
import torch

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from tests.support.trl import trainers

SPEC = "k2@loss/is:token/beta:adaptive-0.001-64"
TOP = "exact@loss/top:4/draws:3/beta:cosine-0.3-0.01-5"
SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "max_steps": 5, "num_iterations": 1}


def finished(model, folder, resume=None, spec=SPEC):
    built = trainers.build(GRPOTrainer, GRPOConfig, model, folder, kl=spec, **SAVING)
    built.train(resume_from_checkpoint=resume)
    return built


def after(built, key, step):
    return [entry[key] for entry in built.state.log_history if key in entry and entry["step"] > step]


@pytest.mark.parametrize("spec", [SPEC, "k1@advantage/beta:dual-0.001-5", "k2@loss/beta:cosine-0.3-0.01-5", TOP])
def test_resumed_equals_uninterrupted(spec, model, tmp_path):
    whole = finished(model, tmp_path / "whole", spec=spec)
    betas = after(whole, "kl/beta", 0)
    assert len(set(betas)) == 5, "the controller should move at every step"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (
        json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["kl_plugins"]["controller"][
            "step"
        ]
        == 2
    )
    resumed = finished(model, tmp_path / "resumed", str(checkpoint), spec)
    for key in ("kl/beta", "loss", "grad_norm", "kl/value"):
        assert after(resumed, key, 2) == after(whole, key, 2), key
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_a_checkpoint_without_controller_state_says_so(model, tmp_path, caplog):
    finished(model, tmp_path / "whole")
    state: Path = tmp_path / "whole" / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    del content["stateful_callbacks"]["kl_plugins"]
    state.write_text(json.dumps(content))
    resumed = finished(model, tmp_path / "resumed", str(state.parent))
    assert "starts again at beta 0.2" in caplog.text
    assert after(resumed, "kl/beta", 2)[0] == 0.2


def test_a_second_run_of_one_trainer_starts_anew(model, tmp_path):
    built = finished(model, tmp_path)
    first = after(built, "kl/beta", 0)
    built.train()
    assert after(built, "kl/beta", 0)[0] == first[0] == 0.2
