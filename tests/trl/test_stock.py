"""Without a spec, training is stock TRL's bit by bit."""

import pytest
import torch
import trl

from kl_plugins.adapters import trl as adapter
from tests.support.trl import trainers


def outcome(trainer, config, model, folder, lora, **changes):
    torch.manual_seed(0)
    built = trainers.build(
        trainer, config, model, folder, lora=lora, num_iterations=2, max_steps=3, learning_rate=1e-2, **changes
    )
    built.train()
    weights = [p.detach().clone() for p in built.model.parameters()]
    timing = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in entry.items() if k not in timing} for entry in built.state.log_history], weights


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_null_is_stock(algorithm, lora, model, tmp_path):
    names = f"{algorithm}Trainer", f"{algorithm}Config"
    stock = outcome(*(getattr(trl, name) for name in names), model, tmp_path, lora)
    subclass = outcome(*(getattr(adapter, name) for name in names), model, tmp_path, lora, kl=None)
    adapter.attach()
    attached = outcome(*(getattr(trl, name) for name in names), model, tmp_path, lora)
    assert stock[0][0]["grad_norm"] > 0
    for log, weights in (subclass, attached):
        assert log == stock[0]
        assert all(map(torch.equal, weights, stock[1]))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_spec_is_not_stock(lora, model, tmp_path):
    # The comparison above can fail.
    stock = outcome(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, lora)
    spec = outcome(adapter.GRPOTrainer, adapter.GRPOConfig, model, tmp_path, lora, kl="k2@loss")
    assert not all(map(torch.equal, stock[1], spec[1]))
