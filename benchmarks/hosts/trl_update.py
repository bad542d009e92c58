"""TRL's real update: ``GRPOTrainer.train`` on the fixture; ``python -m benchmarks.hosts.trl_update FIXTURE CASES OUT``.

The first optimizer step (learning rate 0) makes the rollout batch under the policy of the fixture's rollouts, with
TRL's own log-probs, rewards and advantages. Between the steps a callback loads the policy being updated, and the
second step, TRL's second iteration over the same batch, is what is recorded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.hosts.cases import BETA, Case
from benchmarks.hosts.fixture import GROUP, Rollouts
from benchmarks.hosts.records import Record, read_cases, save
from kl_plugins.adapters import trl as adapter

MICRO_BATCH = 2


class Engine:
    """Stands where TRL's generation stands: gives the fixture's responses, with or without their log-probs."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's ``rollout_func``; prompts are indices of groups."""
        seen: Counter[int] = Counter()
        indices = []
        for prompt in prompts:
            group = int(prompt)
            indices.append(group * GROUP + seen[group])
            seen[group] += 1
        r = self.rollouts
        return {
            "prompt_ids": [r.prompts[i].tolist() for i in indices],
            "completion_ids": [r.responses[i].tolist() for i in indices],
            "logprobs": [r.sampler[i].tolist() for i in indices],
        }

    def install(self, trainer: Any) -> None:
        """In the place of the trainer's own generation, for what refuses a rollout function."""
        made: dict[str, Any] = {}

        def tokenize(prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            made.update(self(prompts, trainer))
            return made["prompt_ids"], None, {}

        trainer._tokenize_prompts = tokenize
        trainer._generate_single_turn = lambda *_, **__: (made["completion_ids"], None)


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
        """After the rollout batch was made."""
        self.trainer.model.load_state_dict(self.current)
        self.watching = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient as the optimizer gets it."""
        if self.watching:
            named = self.trainer.model.named_parameters()
            self.record.gradient = {name: p.grad.detach().clone() for name, p in named}


def settings(case: Case, width: int, output: str) -> dict[str, Any]:
    """TRL's arguments; the ratio is never clipped, so that nothing but the KL depends on the case."""
    found = {
        "output_dir": output, "max_steps": 2, "per_device_train_batch_size": MICRO_BATCH, "num_generations": GROUP,
        "gradient_accumulation_steps": 4, "num_iterations": 2, "max_completion_length": width, "learning_rate": 0.0,
        "beta": BETA, "epsilon": 1e6, "max_grad_norm": 0.0, "loss_type": case.aggregation, "scale_rewards": "none",
        "use_bias_correction_kl": False, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return {**found, **case.native, **({"kl": case.spec} if case.spec else {})}


def update(case: Case, fixture: Path, rollouts: Rollouts, current: dict[str, Tensor], old: dict[str, Tensor]) -> Record:
    """One case."""
    trainer_class, config_class = (
        (adapter.GRPOTrainer, adapter.GRPOConfig) if case.spec else (trl.GRPOTrainer, trl.GRPOConfig)
    )
    record, engine = Record.empty(case, rollouts.lengths), Engine(rollouts)
    groups = len(rollouts.prompts) // GROUP
    with tempfile.TemporaryDirectory() as output:
        args = config_class(**settings(case, max(rollouts.lengths), output))
        trainer = trainer_class(
            str(fixture / case.scenario / "reference"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(groups)]),
            rollout_func=None if case.placement == "reward" else engine,
        )
        if case.placement == "reward":
            engine.install(trainer)
        trainer.model.load_state_dict(old)  # the reference model has been loaded by now
        trainer.add_callback(Watch(trainer, record, rollouts, current))
        trainer.train()
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    record.logged = logged[-1] if logged else None
    return record


def main(fixture: Path, cases: Path, output: Path) -> None:
    """All cases."""
    rollouts = Rollouts.load(fixture)
    current, old = (
        AutoModelForCausalLM.from_pretrained(fixture / "near" / name).state_dict() for name in ("current", "model")
    )
    records = []
    for case in read_cases(cases):
        records.append(update(case, fixture, rollouts, current, old))
        print(f"done {case.name}", flush=True)
    save(output, "trl", trl.__version__, records)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*map(Path, sys.argv[1:]))
