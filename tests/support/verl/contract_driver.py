"""veRL's driver of the contract: its training workers, its reward shaping, its config validation and its program."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from kl_plugins import KLSpec
from kl_plugins.adapters.verl import LOSS_KEY
from kl_plugins.adapters.verl.config import behaviour_source, sampling_of
from kl_plugins.adapters.verl.metrics import finish
from kl_plugins.adapters.verl.observe import observed_in
from kl_plugins.adapters.verl.score import ScoreController
from kl_plugins.adapters.verl.session import collect
from kl_plugins.receipts import Receipt
from tests.contract.driver import BETA, Fault, Outcome, Program, Request, Resumed, Sampled
from tests.support import garbage
from tests.support.verl import main_ppo, remote
from tests.support.verl.configs import composed
from tests.support.verl.workers import PROMPTS, Batch, Group, answer, make_batch

KEYS = {"reference": "ref_log_prob", "old": "old_log_probs", "sampler": "rollout_log_probs"}

ROLLOUT = "actor_rollout_ref.rollout"

PLAIN = Sampled()

STOCK = ("loss", "grad_norm", "kl_loss", "actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac")
"""veRL's own metrics of an update."""


class VerlDriver:
    """Implements :class:`tests.contract.driver.Driver`."""

    host, key = "verl", "algorithm.kl_penalty"

    def __init__(self, single: Group, pair: Group, stock: Group, model: Any, assets: Path, folder: Path) -> None:
        """Take the groups that the suite shares.

        Args:
            single: one worker.
            pair: two workers.
            stock: one worker without kl-plugins in its process.
            model: the initial policy.
            assets: what the host's program needs.
            folder: for checkpoints; empty.
        """
        self._single, self._pair, self._stock = single, pair, stock
        self._batch, self._assets, self._folder = make_batch(model), assets, folder

    def observing(self, spec: str, probe: str = "") -> str:
        """See :meth:`tests.contract.driver.Driver.observing`."""
        return f"low_var_kl/observe{spec and ':'}{spec}{probe}"

    def update(self, request: Request) -> Outcome:
        """See the protocol."""
        group = {1: self._single, 2: self._pair}[request.ranks]
        group.use(request.spec or "low_var_kl", kl_loss_coef=request.betas[0])
        group.ask(remote.record_gradients)
        batch = self._prepared(request)
        metrics: list[dict[str, float]] = []
        for number, beta in enumerate(request.betas, 1):
            group.ask(remote.set_coefficient, beta)
            last = number == len(request.betas)
            before = group.ask(remote.weights)[0]
            if last and request.garbage:
                group.ask(garbage.watch)
            errors, found = self._step(group, batch, request, request.fault if last else None)
            metrics += [found] if found else []
            if any(errors):
                break
        left = tuple(group.ask(garbage.watched)[0]) if request.garbage else None
        after = group.ask(remote.weights)[0]
        gradient = _flat(group.ask(remote.recorded_gradients)[0])
        return Outcome(errors, _differ(before, after), tuple(metrics), None if any(errors) else gradient, left)

    def _prepared(self, request: Request) -> Batch:
        batch, rows = self._batch, len(PROMPTS) // request.ranks
        masks = [mask * (row // rows not in request.empty) for row, mask in enumerate(batch.masks)]
        log_probs = dict(batch.log_probs)
        if not request.sampler:
            del log_probs[KEYS["sampler"]]
        return replace(batch, masks=masks, log_probs=log_probs)

    def _step(
        self, group: Group, batch: Batch, request: Request, fault: Fault | None
    ) -> tuple[tuple[str | None, ...], dict[str, float]]:
        """One optimizer step; the error of each rank, and the metrics of rank 0."""
        from verl.utils import tensordict_utils

        rows = len(PROMPTS) // request.ranks
        if fault is not None:
            row = rows * fault.rank
            if fault.whose == "policy":
                place = (len(batch.prompts[row]) - 1, int(batch.responses[row][0]), fault.value)
                group.ask(remote.break_policy, fault.rank, *place)
            else:
                batch = replace(batch, log_probs=_broken(batch.log_probs, KEYS[fault.whose], row, fault.value))
        data = batch.tensordict()
        tensordict_utils.assign_non_tensor(data, micro_batch_size_per_gpu=rows // request.micro_batches)
        outputs = group.by_rank(data)
        errors = tuple(one if isinstance(one, str) else None for one in outputs)
        return errors, {} if any(errors) else _metrics(outputs[0])

    def score(self, spec: str, fault: Fault | None = None) -> Outcome:
        """See the protocol."""
        from verl import DataProto
        from verl.trainer.ppo import core_algos, ray_trainer

        batch = self._batch
        log_probs = batch.log_probs
        if fault is not None:
            log_probs = _broken(log_probs, KEYS["old" if fault.whose == "policy" else fault.whose], 0, fault.value)
        mask = batch.padded(batch.masks)
        scores = torch.zeros(mask.shape)
        scores[torch.arange(len(mask)), mask.sum(-1) - 1] = torch.arange(len(mask)) / len(mask)
        tensors = {key: batch.padded(values) for key, values in log_probs.items()}
        data = DataProto.from_single_dict({**tensors, "response_mask": mask, "token_level_scores": scores})
        data.non_tensor_batch["uid"] = np.array([str(row // 4) for row in range(len(mask))], dtype=object)
        control = ScoreController(KLSpec.parse(spec), core_algos.FixedKLController(BETA))
        try:
            data, metrics = ray_trainer.apply_kl_penalty(data, kl_ctrl=control, kl_penalty=spec)
            data = ray_trainer.compute_advantage(data, adv_estimator="grpo", num_repeat=4)
        except Exception as error:
            return Outcome((str(error),), changed=False)
        kl = {key: value for key, value in metrics.items() if key.startswith("kl/")}
        return Outcome((None,), changed="advantages" in data.batch and not control.pending, metrics=(kl,))

    def refusal(self, spec: str, *, sampled: Sampled = PLAIN, sampler: bool = True, wrong_key: bool = False) -> str:
        """See the protocol."""
        from verl.utils.config import validate_config

        config = _config(spec, sampled, sampler, in_loss_key=wrong_key or "@loss" in spec or "observe" in spec)
        try:
            validate_config(config, use_reference_policy=True, use_critic=False)
        except Exception as error:
            return str(error)
        return ""

    def receipt(self, spec: str, *, sampled: Sampled = PLAIN, sampler: bool = True) -> Receipt:
        """See the protocol."""
        config, seen = _config(spec, sampled, sampler), observed_in(LOSS_KEY, spec)
        parsed = KLSpec.parse(spec) if seen is None else seen.observation.measured
        self._single.use(spec, receipts=False, reset=False)
        source, expected = behaviour_source(parsed, config), parsed if seen is None else seen.observation
        (found,) = collect(self._single.workers, expected, source, sampling_of(config))
        return found

    def resume(self, before: str, after: str) -> Resumed:
        """See the protocol."""
        folder = self._folder / f"{before}-to-{after}".replace("/", "-")
        self._pair.use(before)
        self._pair.step(self._batch)
        self._pair.workers.save_checkpoint(str(folder), global_step=1)
        saved = [json.loads(path.read_text()) for path in sorted(folder.glob("kl_plugins_rank_*.json"))]
        assert [one["spec"] for one in saved] == [before] * 2
        kept = dict(_digests(folder))
        self._pair.use(after)
        pending = [worker.load_checkpoint.remote(str(folder)) for worker in self._pair.workers.workers]
        first, second = (answer(one) for one in pending)
        assert first == second, "both ranks load, or both refuse"
        error = first if isinstance(first, str) else None
        beta = None if error else self._pair.step(self._batch).metrics["kl/beta"]
        return Resumed(error, saved[0]["controller"]["beta"], beta, intact=kept == dict(_digests(folder)) != {})

    def unused(self) -> tuple[Outcome, Outcome]:
        """See the protocol; without a KL loss, and with two of veRL's own, on a batch that has advantages."""
        random = torch.Generator().manual_seed(11)
        scores = torch.randn(len(PROMPTS), generator=random)
        advantages = [score.expand(len(row)).contiguous() for score, row in zip(scores, self._batch.masks, strict=True)]
        batch = replace(self._batch, advantages=advantages)

        def outcome(group: Group) -> Outcome:
            steps = [group.run(kl, batch) for kl in (None, "low_var_kl", "k2")]
            metrics = tuple({key: one.metrics[key] for key in STOCK if key in one.metrics} for one in steps)
            assert all("loss" in one for one in metrics)
            parts = [part for one in steps for part in (one.gradient, one.parameters)]
            return Outcome(
                (None,), True, metrics, torch.cat([flat for part in parts if (flat := _flat(part)) is not None])
            )

        return outcome(self._stock), outcome(self._single)

    def program(self) -> Program:
        """See the protocol: the sampler breaks once it has the weights of the first update."""
        work = self._folder / "program"
        settings = {
            "actor_rollout_ref.actor.use_kl_loss": True,
            "actor_rollout_ref.actor.kl_loss_coef": 0.1,
            "actor_rollout_ref.actor.kl_loss_type": "k2@loss/is:token",
            "trainer.save_freq": 1,
            "trainer.total_training_steps": 3,
        }
        ended = main_ppo.run(self._assets, work, settings, environment={"SAMPLER_NAN": "1"})
        assert [step["training/global_step"] for step in ended.steps] == [1], ended.error()
        names = tuple(path.name for path in (work / "checkpoints").glob("global_step_*"))
        return Program(ended.status, ended.output, names)


def _config(spec: str, sampled: Sampled, sampler: bool, in_loss_key: bool = True) -> Any:
    """veRL's config, of a run on one GPU."""
    placement = (
        {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_type": spec}
        if in_loss_key
        else {"algorithm.use_kl_in_reward": True, "algorithm.kl_penalty": spec}
    )
    settings: dict[str, Any] = {
        "trainer.n_gpus_per_node": 1,
        "data.train_batch_size": 256,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
        "algorithm.adv_estimator": "grpo",
        f"{ROLLOUT}.calculate_log_probs": sampler,
        f"{ROLLOUT}.temperature": sampled.temperature,
        f"{ROLLOUT}.top_p": sampled.top_p,
        f"{ROLLOUT}.top_k": sampled.top_k or -1,
        f"{ROLLOUT}.logprobs_mode": "raw_logprobs" if sampled.raw else "processed_logprobs",
        **placement,
    }
    assert sampled.min_p == 0, "veRL has no such setting"
    config = copy.deepcopy(composed())  # composing takes a second
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    return config


def _broken(log_probs: dict[str, list[Tensor]], key: str, row: int, value: float) -> dict[str, list[Tensor]]:
    rows = [values.clone() for values in log_probs[key]]
    rows[row][0] = value
    return {**log_probs, key: rows}


def _metrics(output: Any) -> dict[str, float]:
    from verl.utils import tensordict_utils
    from verl.utils.metric import reduce_metrics

    found: dict[str, Any] = reduce_metrics(tensordict_utils.get(output, "metrics"))
    finish(found, prefix="")
    return {key: float(value) for key, value in found.items() if key.startswith("kl/")}


def _flat(named: dict[str, Tensor]) -> Tensor | None:
    return torch.cat([named[name].float().flatten() for name in sorted(named)]) if named else None


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()
