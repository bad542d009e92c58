"""TRL's real update: ``GRPOTrainer.train`` on the fixture; ``python -m benchmarks.hosts.trl_update FIXTURE CASES OUT``.

The first optimizer step (learning rate 0) makes the rollout batch under the policy of the fixture's rollouts, with
TRL's own log-probs, rewards and advantages. Between the steps a callback loads the policy being updated. The second
step, TRL's second iteration over the same batch, is recorded.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.drivers import trl
from benchmarks.hosts.cases import BETA, Case
from benchmarks.hosts.fixture import GROUP, Rollouts
from benchmarks.hosts.records import Record, read_cases, save

MICRO_BATCH = 2


class Watch(TrainerCallback):  # type: ignore[misc]
    """Moves the policy after the first step and keeps the gradient of the second."""

    def __init__(self, trainer: Any, record: Record, rollouts: Rollouts, current: dict[str, Tensor]) -> None:
        self.trainer, self.record, self.rollouts, self.current = trainer, record, rollouts, current
        self.watching = False
        score, compute = trainer._get_per_token_logps_and_entropies, trainer.compute_loss

        def scored(model: Any, ids: Tensor, attention: Tensor, kept: int, *args: Any, **kwargs: Any) -> Any:
            found = score(model, ids, attention, kept, *args, **kwargs)
            if self.watching and found[0].requires_grad:
                record.see(rollouts.index_of, ids[:, -kept:], attention[:, -kept:], found[0])
            return found

        def computed(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            if self.watching:
                record.loss += loss.item()
            return loss

        trainer._get_per_token_logps_and_entropies, trainer.compute_loss = scored, computed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the policy being updated after the rollout batch was made."""
        self.trainer.model.load_state_dict(self.current)
        self.watching = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the gradient as the optimizer gets it."""
        if self.watching:
            named = self.trainer.model.named_parameters()
            self.record.gradient = {name: p.grad.detach().clone() for name, p in named}


def settings(case: Case, width: int, output: str) -> dict[str, Any]:
    """Return TRL's arguments. The ratio is never clipped, so that only the KL depends on the case."""
    return {
        "output_dir": output, "max_steps": 2, "per_device_train_batch_size": MICRO_BATCH, "num_generations": GROUP,
        "gradient_accumulation_steps": 4, "num_iterations": 2, "max_completion_length": width, "learning_rate": 0.0,
        "beta": BETA, "epsilon": 1e6, "max_grad_norm": 0.0, "loss_type": case.aggregation, "scale_rewards": "none",
        "use_bias_correction_kl": False, "use_cpu": True, "lr_scheduler_type": "constant", **case.native,
    }  # fmt: skip


def update(case: Case, fixture: Path, rollouts: Rollouts, current: dict[str, Tensor], old: dict[str, Tensor]) -> Record:
    """Run one case and return its record."""
    record = Record.empty(case, rollouts.lengths)
    responses = trl.Responses(rollouts.prompts, rollouts.responses, rollouts.sampler, GROUP)
    with tempfile.TemporaryDirectory() as output:
        trainer = trl.make_trainer(
            fixture / case.scenario / "reference", case.spec, responses,
            lambda completions, **_: [0.0] * len(completions), in_reward=case.placement == "reward",
            **settings(case, max(rollouts.lengths), output),
        )  # fmt: skip
        trainer.model.load_state_dict(old)  # The reference model has already been loaded.
        trainer.add_callback(Watch(trainer, record, rollouts, current))
        trainer.train()
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    record.logged = logged[-1] if logged else None
    return record


def main(fixture: Path, cases: Path, output: Path) -> None:
    """Run all cases and write their records."""
    trl.stay_on_the_cpu()
    rollouts = Rollouts.load(fixture)
    current, old = (
        AutoModelForCausalLM.from_pretrained(fixture / "near" / name).state_dict() for name in ("current", "model")
    )
    records = []
    for case in read_cases(cases):
        records.append(update(case, fixture, rollouts, current, old))
        print(f"done {case.name}", flush=True)
    save(output, "trl", version("trl"), records)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*map(Path, sys.argv[1:]))
