"""The policies whose states are measured: one trained by TRL's GRPO, one with perturbed weights, and their states."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.llm.decode import drawer
from benchmarks.llm.measure import logits
from benchmarks.llm.model import load, tokenizer_of
from benchmarks.llm.sampler import LaggedSampler
from benchmarks.llm.settings import RUN_FILES, Settings, run_key, sources
from benchmarks.llm.tasks import prompts_of
from benchmarks.llm.train import arguments, classes, longest
from benchmarks.reporting import finished, write_json
from benchmarks.study.sampler import Drawn
from benchmarks.study.trl_host import against_the_sampler

from .noise import KS, StateNoise, library_difference, measured

ROWS = 16  # completions that are drawn and measured at once
STATES = 32  # states whose float64 softmax is in memory at once
COMPARED = 64  # states per policy in which the library's own numbers are compared
VISIT_SEED = 30_000  # other draws than those of training and of the other benchmarks


@dataclass(frozen=True)
class Visited:
    """The states of completions of a policy.

    Attributes:
        noise: results per state, on the CPU.
        sequence: (N,) index of the completion that each state belongs to.
        difference: largest difference to the library's remainder in some of the states, nats.
    """

    noise: StateNoise
    sequence: Tensor
    difference: float


def train(arm: str, seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train a policy with TRL's GRPO and save it, unless the folder has the policy of the same settings already.

    Args:
        arm: `none`, `trl` or a KL spec.
        seed: seed of the rollouts.
        settings: settings of the run; a `delay` of 0 draws with `LaggedSampler`, and None with TRL's generation.
        folder: folder for the policy and for `training.json`, the record.

    Returns:
        The record: `settings`, `arm`, `seed`, `reward` of the first and the last step, and `seconds`.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from kl_plugins.adapters.trl import detach

    key = run_key(settings, arm, seed, sources(RUN_FILES))
    record = finished(folder / "training.json", key)
    if record is not None:
        return record
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    start, model = time.perf_counter(), Path(settings.model)
    tokenizer, policy = tokenizer_of(model), load(model, settings.device)
    prompts = prompts_of(settings.task, tokenizer)
    trainer_class, config_class = classes(arm)
    extra: dict[str, Any] = {}
    if settings.delay is not None:
        trainer_class = against_the_sampler(trainer_class)
        shape = settings.batch, longest(prompts, tokenizer), settings.tokens
        extra["rollout_func"] = LaggedSampler(model, settings.device, settings.delay, tokenizer, shape, seed)
    try:
        with tempfile.TemporaryDirectory() as output:
            trainer = trainer_class(
                policy,
                reward_funcs=prompts.reward,
                args=config_class(**arguments(arm, seed, settings, output)),
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts.trained]),
                processing_class=tokenizer,
                **extra,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        detach()
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    record = {
        "key": key, "settings": asdict(settings), "arm": arm, "seed": seed,
        "reward": [rewards[0], rewards[-1]], "seconds": time.perf_counter() - start,
    }  # fmt: skip
    write_json(folder / "training.json", record)
    return record


@torch.no_grad()
def perturb(model: Any, share: float, seed: int) -> None:
    """Add normal noise to all weights of a model, in place.

    Args:
        model: the model.
        share: standard deviation of the noise relative to that of each parameter tensor.
        seed: seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(noise * parameter.std(correction=0) * share)


@torch.no_grad()
def visit(policy: Any, reference: Any, settings: Settings, tick: Callable[[], None] = lambda: None) -> Visited:
    """Draw completions of the policy on the held-out prompts, and measure the token noise in each of their states.

    Args:
        policy, reference: models in evaluation mode and float32, on one device.
        settings: `evaluation_samples` completions per prompt, with at most `tokens` tokens each.
        tick: function that is called after each batch of completions.
    """
    tokenizer = tokenizer_of(Path(settings.model))
    prompts = prompts_of(settings.task, tokenizer)
    repeated = repeated_prompts(prompts.held_out, settings)
    draw = drawer(policy, tokenizer, min(ROWS, len(repeated)), longest(prompts, tokenizer), settings.tokens).draw
    generator = torch.Generator(policy.device).manual_seed(VISIT_SEED)
    parts: list[StateNoise] = []
    sequences: list[Tensor] = []
    difference = 0.0
    for start in range(0, len(repeated), ROWS):
        drawn = draw(repeated[start : start + ROWS], generator)
        for own, ref, labels, sequence in _states(policy, reference, drawn):
            parts += [
                StateNoise(*(values.cpu() for values in measured(*pair)))
                for pair in zip(torch.split(own, STATES), torch.split(ref, STATES), strict=True)
            ]
            if not sequences:
                compared = slice(COMPARED)
                difference = library_difference(own[compared], ref[compared], labels[compared], KS)
            sequences.append(start + sequence.cpu())
        tick()
    noise = StateNoise(*(torch.cat([getattr(part, field) for part in parts]) for field in StateNoise._fields))
    return Visited(noise, torch.cat(sequences), difference)


def repeated_prompts(held_out: tuple[str, ...], settings: Settings) -> list[str]:
    """Return each prompt as often as completions of it are drawn."""
    return [prompt for prompt in held_out for _ in range(settings.evaluation_samples)]


def _states(policy: Any, reference: Any, drawn: Drawn) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield logits of policy and reference, (N, V) each, (N,) labels and (N,) indices of the rows of the states."""
    all_labels = drawn.sequences[:, drawn.prompt_ids.shape[1] :]
    for (rows, own), (_, ref) in zip(logits(policy, drawn), logits(reference, drawn), strict=True):
        mask = drawn.mask[rows]
        yield own[mask], ref[mask], all_labels[rows][mask], rows.start + mask.nonzero()[:, 0]
