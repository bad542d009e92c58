"""Faults that only one guard notices in TRL, beside those in test_refusals.py and test_config.py.

The table "Guards against a run without the regulariser" in CONTRIBUTING.md names these tests.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from kl_plugins.patches.trl import hooks
from tests.support.trl import trainers

LOSS = next(patch for patch in hooks.PATCHES.patches if patch.qualname == "GRPOTrainer._compute_loss")


def without_kl(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss of TRL's that does not multiply beta with a KL."""
    logp = trainer._get_per_token_logps_and_entropies(
        model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), inputs["completion_ids"].size(1),
    )[0]  # fmt: skip
    return -logp.mean()


def with_two(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss of TRL's that multiplies beta with two KLs."""
    loss = without_kl(trainer, model, inputs)
    mask = inputs["completion_mask"].float()
    return loss + (trainer.beta * mask).mean() + (trainer.beta * mask).mean()


@pytest.mark.parametrize(("loss", "times"), [(without_kl, 0), (with_two, 2)])
def test_a_loss_that_does_not_use_beta_once_is_stopped(
    loss: Any, times: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss")

    def compute(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        def wrapped(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            return loss(self, model, inputs)

        return LOSS.wrapper(wrapped, self, (model, inputs), {})

    # The hook stays, and the function behind it is another: as if TRL's code had changed after the check.
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute)
    with pytest.raises(RuntimeError, match=f"used beta {times} times where it should have done so once"):
        built.train()
