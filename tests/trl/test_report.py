"""``kl-plugins report`` reads what TRL itself writes, with and without a spec."""

import pytest
import trl

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from kl_plugins.report.findings import NOT_ACTIVE, find
from kl_plugins.report.reading import read_runs
from tests.support.trl.trainers import build

CLASSES = {"spec": (GRPOTrainer, GRPOConfig), "native": (trl.GRPOTrainer, trl.GRPOConfig)}


@pytest.mark.parametrize("name", CLASSES)
def test_the_state_of_a_real_run(name, model, tmp_path):
    changes = {"kl": "default"} if name == "spec" else {}
    trainer = build(*CLASSES[name], model, tmp_path / name, **changes)
    trainer.train()
    trainer.save_state()
    (run,) = read_runs([str(tmp_path / name)])
    assert run.logs.title == "TRL"
    assert run.steps() == (1, 2)
    assert run.active is (name == "spec")
    assert [run.of_role(role) for role in ("reward", "kl", "grad_norm")] == [["reward"], ["kl"], ["grad_norm"]]
    assert any(finding.rule == NOT_ACTIVE for finding in find([run])) is (name == "native")
    assert "kl/active" in run.series or name == "native"
