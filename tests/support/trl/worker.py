"""What one of two processes does; started by ``launch.torchrun``: ``worker SCENARIO MODEL FOLDER``."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl

from kl_plugins.adapters import trl as adapter
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.trl.processes import end_process_group
from tests.support.trl import trainers

RANK = int(os.environ["RANK"])
TWO = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 3, "learning_rate": 1e-2}


def outcome(trainer: type, config: type, model: str, folder: Path, **changes: object) -> dict[str, object]:
    torch.manual_seed(0)
    built = trainers.build(trainer, config, model, folder, **TWO, **changes)
    built.train()
    weights = torch.cat([p.detach().flatten() for p in built.model.parameters()])
    keys = [key for key in built.state.log_history[0] if "time" not in key]
    return {
        "log": {key: trainers.log_of(built, key) for key in keys},
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    }


def stock(model: str, folder: Path) -> dict[str, object]:
    """Stock TRL, and TRL with the plugin there but unused."""
    found: dict[str, object] = {}
    for lora in (False, True):
        found[f"stock {lora}"] = outcome(trl.GRPOTrainer, trl.GRPOConfig, model, folder, lora=lora)
        found[f"subclass {lora}"] = outcome(adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, lora=lora, kl=None)
        adapter.attach()
        found[f"attached {lora}"] = outcome(trl.GRPOTrainer, trl.GRPOConfig, model, folder, lora=lora)
        adapter.detach()
    return found


def train(model: str, folder: Path) -> dict[str, object]:
    """Every placement, with a controller."""
    specs = (
        "k2@loss/is:token/beta:adaptive-0.001-64",
        "k1@reward",
        "k1@advantage",
        "exact@loss",
        "exact@advantage",
        "exact@loss/top:4/draws:3/is:token",
        "exact@advantage/top:4",
    )
    found: dict[str, object] = {
        spec: outcome(adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, kl=spec, num_iterations=2)
        for spec in specs
    }
    found["exact@loss lora"] = outcome(
        adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, kl="exact@loss", num_iterations=2, lora=True
    )
    for name, cls, config, extra in (
        ("RLOO stock", trl.RLOOTrainer, trl.RLOOConfig, {}),
        ("RLOO", adapter.RLOOTrainer, adapter.RLOOConfig, {"kl": "k1@reward"}),
    ):
        found[name] = outcome(cls, config, model, folder, **extra)
    found["reordered"] = reordered(model, folder)
    return found


class Reordered(adapter.GRPOTrainer):
    """On rank 1, what the reference's pass gave belongs to other rows than TRL's log-probs."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        return inputs if RANK == 0 else {**inputs, KEY: inputs[KEY].roll(1, 0)}


def reordered(model: str, folder: Path) -> dict[str, object]:
    """The text of the error that stops the update."""
    try:
        outcome(Reordered, adapter.GRPOConfig, model, folder, kl="exact@loss/top:4")
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def missing(model: str, folder: Path) -> dict[str, object]:
    """Rank 1 trains with stock TRL."""
    if RANK == 1:
        return outcome(trl.GRPOTrainer, trl.GRPOConfig, model, folder)
    return outcome(adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, kl="k2@loss")


def unequal(model: str, folder: Path) -> dict[str, object]:
    """Each rank names another regulariser."""
    return outcome(adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, kl=("k2@loss", "k3@loss")[RANK])


if __name__ == "__main__":
    scenario, model, folder = sys.argv[1:]
    result = {"stock": stock, "train": train, "missing": missing, "unequal": unequal}[scenario](model, Path(folder))
    (Path(folder) / f"{RANK}.json").write_text(json.dumps(result))
    end_process_group()
