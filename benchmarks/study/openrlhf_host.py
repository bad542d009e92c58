"""One run in OpenRLHF: its real Ray actors and its own training step, with completions from a sampler that may lag.

The run is as close to the runs in TRL as OpenRLHF's flags allow. The differences are:

- OpenRLHF recomputes the old log-probs, so with one update per rollout its ratio is 1 and its clipping never acts.
  OpenRLHF's own correction is used instead: it multiplies each token's policy-gradient term by the weight against the
  sampler, and drops the term if that weight is outside 0.5 to 5, OpenRLHF's default band. With this correction, the
  weights of a spec divide by the sampler's probabilities, as they do in TRL.
- `@reward` can be trained with a sampler that lags or is in bf16. Like `@advantage`, it computes the penalty from the
  policy's own log-probs.
- Losses are means over the batch's tokens, while TRL divides by the longest completion.
"""

from __future__ import annotations

import atexit
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.demo.curve import Curve, Tick
from benchmarks.demo.train import load
from benchmarks.drivers import openrlhf, openrlhf_actor
from kl_plugins.adapters.receipts import announce
from tests.support.openrlhf.harness import Harness
from tests.support.openrlhf.rollouts import Rollouts

from .measure import LOGGED, Measure
from .sampler import Drawn, LaggedSampler
from .settings import Cell, Settings
from .tasks import TASKS
from .text import completion_tokens, tokenizer_of

ESTIMATORS = {"none": "dr_grpo", "group": "group_norm"}
"""OpenRLHF's names for TRL's `scale_rewards`.

Both subtract the group's mean from the rewards; `group` also divides by the group's standard deviation.
"""

NAMES = {"grad_norm": "actor_grad_norm", "clip_ratio/region_mean": "is_filter_ratio"}
"""OpenRLHF's names for entries of TRL's log. The second is the share of tokens without a policy gradient in both."""


@cache
def actors() -> Harness:
    """Return this process's policy and reference actors, in a Ray cluster that ends with the process."""
    cluster = ExitStack()
    cluster.enter_context(openrlhf.session())
    atexit.register(cluster.close)
    return openrlhf.actors_of(Path())  # Each run loads its own models.


def flags(cell: Cell, settings: Settings, seed: int, prompts: int) -> list[str]:
    """Return OpenRLHF's command line, for one optimizer step per rollout, in one micro-batch.

    Args:
        cell: the cell to train.
        settings: settings of the study.
        seed: seed of the host's own randomness, which is the order within a batch.
        prompts: number of prompts per step.
    """
    whole = prompts * settings.generations
    regularised = cell.arm != "none"
    values = {
        "--rollout.batch_size": prompts,
        "--rollout.n_samples_per_prompt": settings.generations,
        "--rollout.micro_batch_size": whole,
        "--train.batch_size": whole,
        "--train.micro_batch_size": whole,
        "--train.max_epochs": 1,
        "--train.seed": seed,
        "--algo.advantage.estimator": ESTIMATORS[settings.scale_rewards],
        "--algo.advantage.is_correction_level": "token",
        "--algo.kl.init_coef": settings.beta if regularised else 0,
        "--actor.adam.lr": settings.learning_rate,
        "--actor.lr_scheduler": "linear",
        "--actor.max_norm": settings.max_grad_norm,
    }
    found = [str(word) for pair in values.items() for word in pair]
    found += ["--actor.adam.betas", "0.9", "0.999"]  # TRL's default
    if not regularised:
        return found
    return found + openrlhf.kl_flags(cell.arm, in_loss=cell.arm.partition("@")[2].partition("/")[0] == "loss")


def in_host_form(drawn: Drawn, rewards: list[float]) -> Rollouts:
    """Return the completions in the form of OpenRLHF's own sampler."""
    start = drawn.prompt_ids.shape[1]
    prompts = [row[on] for row, on in zip(drawn.prompt_ids, drawn.attention[:, :start].bool(), strict=True)]
    responses = [torch.tensor(row) for row in drawn.completion_lists()]
    return Rollouts.of(prompts, responses, [torch.tensor(row) for row in drawn.log_prob_lists()], rewards)


def refuse(cell: Cell, settings: Settings) -> None:
    """Raise for cells that cannot run here, but that neither OpenRLHF nor kl-plugins rejects.

    Raises:
        ValueError: if the arm is TRL's own KL, or the device is not the one that OpenRLHF runs on here.
    """
    if cell.arm != "none" and cell.regulariser.spec is None:
        raise ValueError(f"{cell.arm} is TRL's own KL and cannot be trained in OpenRLHF; use a spec such as k3@loss")
    if settings.optimizer != "adamw":
        raise ValueError(f"the study trains with {settings.optimizer} in TRL alone, not in OpenRLHF; use --host trl")
    if settings.device != "cpu":
        raise ValueError(f"the study's OpenRLHF runs on the CPU alone, not on {settings.device}; use --device cpu, or "
                         "--host trl")  # fmt: skip


def run(
    cell: Cell, seed: int, settings: Settings, reference_folder: Path, tick: Tick,
    find_actors: Callable[[], Harness] = actors,
) -> dict[str, Any]:  # fmt: skip
    """Train one cell with one seed.

    Args:
        cell: the cell to train.
        seed: seed of prompts and rollouts.
        settings: settings of the study.
        reference_folder: folder in which the reference was saved.
        tick: called with the number of steps done.
        find_actors: returns actors that can compute in float32.

    Returns:
        The same as `trl_host.run`. `cpu_seconds` is the processor time of this process and both actors.

    Raises:
        ValueError: if kl-plugins rejects the spec in OpenRLHF, or `refuse` rejects the cell.
    """
    refuse(cell, settings)
    task, tokenizer = TASKS[cell.task], tokenizer_of(settings)
    policy, reference = load(reference_folder).eval(), load(reference_folder).eval()
    sampler = LaggedSampler(cell.delay, cell.precision, completion_tokens(task, settings, tokenizer), seed)
    measure = Measure(reference, task, settings, tokenizer)
    host = find_actors()
    curve = Curve(settings, lambda: measure(policy), tick, LOGGED)
    start, cpu = time.perf_counter(), _processor_seconds(host)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(host, "assets", Path(folder)):
        for name in ("model", "reference"):
            (host.assets / name).symlink_to(reference_folder.resolve())
        with openrlhf.parsed_in("fp32"):
            given = flags(cell, settings, seed, task.prompts_per_step(settings.prompts))
            trainer = host.start(given, settings.steps)
        if cell.arm == "none":  # Without a KL, OpenRLHF's own program has no reference.
            trainer.reference_model_group = trainer.experience_maker.initial_model_group = None
        for receipt in host.receipts(trainer):
            announce(receipt)  # The run's record contains the receipt.
        _follow(policy, host)
        curve.measure(0)
        for step, texts in zip(range(settings.steps), task.batches(settings.prompts, seed), strict=False):
            prompts = [text for text in texts for _ in range(settings.generations)]
            drawn = sampler.draw(policy, tokenizer, prompts)
            answers = tokenizer.batch_decode(drawn.completion_lists(), skip_special_tokens=True)
            rollouts = in_host_form(drawn, task.reward(prompts, answers))
            status, _ = trainer.train_step(rollouts.experiences(), step)
            _follow(policy, host)
            curve.log(_as_in_trl(status))
            curve.step(step + 1)
    seconds, cpu = time.perf_counter() - start, _processor_seconds(host) - cpu
    return {"curve": curve.points, "seconds": seconds, "cpu_seconds": cpu, "evaluation_seconds": curve.seconds}


def _follow(policy: Any, host: Harness) -> None:
    """Load the actor's weights into a local copy of the policy."""
    weights = host.ask(openrlhf_actor.weights)[0]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(weights[name])


def _as_in_trl(status: dict[str, Any]) -> dict[str, Any]:
    return {key: status[name] for key in LOGGED if (name := NAMES.get(key, key)) in status}


def _processor_seconds(host: Harness) -> float:
    import ray

    handlers = host.policy._actor_handlers + host.reference._actor_handlers
    spent = ray.get([actor.__ray_call__.remote(openrlhf_actor.processor_seconds) for actor in handlers])
    return time.process_time() + sum(spent)
