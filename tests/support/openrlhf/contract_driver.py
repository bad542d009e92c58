"""The contract's driver for OpenRLHF: its real trainer and workers, argument parsing, checkpoints and program.

One harness of one rank and one of two serve all rows. Faults go in where they would arise: the sampler's log-probs in
the rollouts, those of reference and old policy in what their workers answer, the policy's in the logits of its model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
import torch
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import vllm_engine

from kl_plugins import KLSpec
from kl_plugins.adapters.openrlhf import require_receipts
from kl_plugins.receipts import Receipt
from kl_plugins.spec.observation import looks_like_observation
from tests.contract.driver import BETA, Fault, Outcome, Program, Request, Resumed, Sampled
from tests.support import garbage
from tests.support.openrlhf import by_hand, cli, remote
from tests.support.openrlhf.command_line import ONE_STEP, parse
from tests.support.openrlhf.harness import ONE_STEP_STOCK, STOCK, Harness
from tests.support.openrlhf.rollouts import Rollouts

USE, ESTIMATOR = "--algo.kl.use_loss", "--algo.kl.estimator"
CORRECTED = ("--algo.advantage.is_correction_level", "token")
GROUPS = ("--algo.advantage.estimator", "group_norm")
WHOLE = Sampled()
TOKEN = 1
"""Which response token of a sequence is spoilt."""

AGENT = """
from openrlhf.utils.agent import SingleTurnAgentExecutor


class AgentExecutor(SingleTurnAgentExecutor):
    def __init__(self):
        super().__init__({reward!r})
        self.answers = 0

    async def execute(self, *args, **kwargs):
        response = await super().execute(*args, **kwargs)
        self.answers += 1
        if self.answers > {good}:
            response["rollout_log_probs"][-1] = float("nan")
        return response
"""
"""An agent of a user's own whose log-probs are sound for a while."""


class OpenRLHFDriver:
    """OpenRLHF for :class:`tests.contract.driver.Driver`."""

    host = "openrlhf"
    key = USE

    def __init__(
        self,
        assets: Path,
        rollouts: Rollouts,
        harness: Harness,
        pair: Callable[[], Harness],
        stock: Callable[[], dict[str, dict[str, Any]]],
        folder: Path,
    ) -> None:
        """Keep the suite's fixtures.

        Args:
            assets: models and data.
            rollouts: of 8 sequences.
            harness: actors of one rank.
            pair: gives actors of two ranks.
            stock: gives the results of the host's own settings in processes without kl-plugins.
            folder: an empty one.
        """
        self.assets, self.harness, self.pair, self.stock, self.folder = assets, harness, pair, stock, folder
        self.rollouts = replace(rollouts, rewards=[0.5] * len(rollouts.rewards))  # so that advantages are 0
        self._started: tuple[Harness, list[str], Any] | None = None
        self._untouched = False
        self._engine: Any = None
        for module in (by_hand, garbage):
            ray.cloudpickle.register_pickle_by_value(module)

    # Updates

    def observing(self, spec: str, probe: str = "") -> str:
        """See :meth:`tests.contract.driver.Driver.observing`."""
        return f"k3/observe{spec and ':'}{spec}{probe}"

    def update(self, request: Request) -> Outcome:
        """See :meth:`tests.contract.driver.Driver.update`."""
        host = self.harness if request.ranks == 1 else self.pair()
        micro = len(self.rollouts.rewards) // request.ranks // request.micro_batches
        flags = [*ONE_STEP, "--train.micro_batch_size", str(micro), "--algo.kl.init_coef", str(request.betas[0])]
        trainer = self._trainer(host, [*flags, *_flags(request.spec or "k3", request.sampler)])
        rollouts = self._rollouts(request)
        metrics: list[dict[str, float]] = []
        for step, beta in enumerate(request.betas):
            trainer.kl_ctl.value = beta
            fault = request.fault if step == len(request.betas) - 1 else None
            before = host.ask(remote.flat)[0]
            spoilt = _spoilt(host, rollouts, fault, training=True)
            if request.garbage and step == len(request.betas) - 1:
                garbage.watch()
                host.ask(garbage.watch)
            with spoilt as samples, _moved(host, trainer), recorded(host) as fits:
                try:
                    status, _ = trainer.train_step(samples.experiences(), step)
                except Exception as error:
                    errors = by_rank(fits) or (_text(error),) * request.ranks
                    self._untouched = not fits and step == 0
                    after = host.ask(remote.flat)[0]
                    return Outcome(errors, not torch.equal(before[0], after[0]), tuple(metrics))
            metrics.append({key: value for key, value in status.items() if key.startswith("kl/")})
        left = (*garbage.watched(), *host.ask(garbage.watched)[0]) if request.garbage else None
        after = host.ask(remote.flat)[0]
        gradient = (after[1] - after[2] * before[1]) / (1 - after[2])  # Adam's first moment: m' = b m + (1 - b) g
        return Outcome((None,) * request.ranks, not torch.equal(before[0], after[0]), tuple(metrics), gradient, left)

    def _trainer(self, host: Harness, flags: list[str]) -> Any:
        """A trainer whose models are as at the start: that of the last request, where its workers never trained."""
        started, untouched = self._started, self._untouched
        if not (untouched and started is not None and started[:2] == (host, flags)):
            started = (host, flags, self._start(host, flags))
            host.receipts(started[2])
        self._started, self._untouched = started, False
        return started[2]

    def _start(self, host: Harness, flags: list[str]) -> Any:
        self._untouched = False  # the workers' models are others now
        return host.start(flags)

    def _rollouts(self, request: Request) -> Rollouts:
        found = self.rollouts if request.sampler else self.rollouts.without_log_probs()
        each = len(found.rewards) // request.ranks
        empty = [rank * each + index for rank in request.empty for index in range(each)]
        return found.with_empty_mask(*empty) if empty else found

    def score(self, spec: str, fault: Fault | None = None) -> Outcome:
        """See :meth:`tests.contract.driver.Driver.score`."""
        trainer = self._start(self.harness, [*ONE_STEP, *GROUPS, *_flags(spec, True)])
        with _spoilt(self.harness, self.rollouts, fault) as samples:
            try:
                trainer.experience_maker.make_experience_batch(samples.experiences())
            except Exception as error:
                return Outcome((_text(error),), False)
        return Outcome((None,), True, (trainer.kl_ctl.metrics.total(),))

    # Settings

    def refusal(self, spec: str, *, sampled: Sampled = WHOLE, sampler: bool = True, wrong_key: bool = False) -> str:
        """See :meth:`tests.contract.driver.Driver.refusal`.

        Raw log-probs come from engines that a launcher of a user's own has started: OpenRLHF has no setting for it.
        """
        flags = [*_flags(spec, sampler), *_sampling(sampled), *((USE,) if wrong_key else ())]
        try:
            parse(self.assets, flags)
            if sampled.raw:
                trainer = self._start(self.harness, flags)
                self._engine = self._engine or raw_engine(self.assets)
                trainer.vllm_engines = [self._engine]
                trainer.init_checkpoint_states()
        except Exception as error:
            return _text(error)
        return ""

    def receipt(self, spec: str, *, sampled: Sampled = WHOLE, sampler: bool = True) -> Receipt:
        """See :meth:`tests.contract.driver.Driver.receipt`."""
        self._untouched = False
        args = parse(self.assets, [*_flags(spec, sampler), *_sampling(sampled)])
        if not self.harness.ask(remote.with_arguments, args)[0]:
            self._start(self.harness, _flags("k2@loss", False))
            self.harness.ask(remote.with_arguments, args)
        (receipt,) = require_receipts(self.harness.policy, args)
        return receipt

    # Checkpoints

    def resume(self, before: str, after: str) -> Resumed:
        """See :meth:`tests.contract.driver.Driver.resume`."""
        folder = self.folder / f"resume-{len(list(self.folder.iterdir()))}"
        flags = [*ONE_STEP, "--algo.kl.init_coef", str(BETA), "--ckpt.path", str(folder), "--ckpt.save_steps", "1"]
        trainer = self._start(self.harness, [*flags, *_flags(before, True)])
        trainer.init_checkpoint_states()
        self.harness.train(trainer, self.rollouts)
        states = {"episode": 0, "global_step": 1, "total_consumed_prompts": 4, "data_loader_state_dict": {}}
        trainer.save_logs_and_checkpoints(1, {}, states)
        saved = states["kl_plugins"]["controller"]
        files = _digests(folder)
        resumed = self._start(self.harness, [*flags, *_flags(after, True), "--ckpt.load_enable"])
        error = beta = None
        try:
            resumed.init_checkpoint_states()
            beta = self.harness.train(resumed, self.rollouts)[0][0]["kl/beta"]
        except Exception as raised:
            error = _text(raised)
        return Resumed(error, saved["beta"] if saved else BETA, beta, intact=files == _digests(folder) != {})

    # Without a spec, and the whole program

    def unused(self) -> tuple[Outcome, Outcome]:
        """See :meth:`tests.contract.driver.Driver.unused`."""
        stock = self.stock()[ONE_STEP_STOCK]
        # The same rollouts as in the processes without kl-plugins, whose rewards differ.
        self._untouched = False
        ours = self.harness.run(STOCK[ONE_STEP_STOCK], self._stock_rollouts())
        return _stock_outcome(stock["metrics"], stock["gradient"]), _stock_outcome(ours.metrics, ours.gradient)

    def _stock_rollouts(self) -> Rollouts:
        from tests.support.openrlhf.rollouts import make_rollouts

        return make_rollouts(self.assets / "model")

    def program(self) -> Program:
        """See :meth:`tests.contract.driver.Driver.program`."""
        work = self.folder / "program"
        work.mkdir()
        agent = work / "agent.py"
        agent.write_text(AGENT.format(reward=str(self.assets / "reward.py"), good=8))  # one step takes 8 answers
        flags = [*cli.COLOCATED, USE, ESTIMATOR, "k2@loss/is:token/behaviour:sampler"]
        flags += ["--train.agent_func_path", str(agent), "--ckpt.save_steps", 1]
        found = cli.run(self.assets, work, flags)
        assert len(found.steps) == 1, found.error()
        checkpoints = (path.name for path in (work / "checkpoints" / "_actor").glob("global_step*"))
        return Program(found.status, found.output, tuple(sorted(checkpoints)))


def _flags(spec: str, sampler: bool) -> list[str]:
    """The command line of a spec, or of one of the host's own estimators as a loss."""
    found = [ESTIMATOR, spec]
    if "@" not in spec or looks_like_observation(spec) or KLSpec.parse(spec).placement == "loss":
        found.append(USE)
    return [*found, *(CORRECTED if sampler else ())]


def _sampling(sampled: Sampled) -> list[str]:
    if sampled.top_k or sampled.min_p:
        raise ValueError("OpenRLHF has no setting for top-k and min-p")
    return ["--rollout.temperature", str(sampled.temperature), "--rollout.top_p", str(sampled.top_p)]


def _text(error: Exception) -> str:
    """The message of the original error, where Ray has wrapped it."""
    return str(getattr(error, "cause", None) or error)


def by_rank(fits: Sequence[Any]) -> tuple[str | None, ...]:
    """What each worker's update ended with; empty where no update was started."""
    found: list[str | None] = []
    for reference in fits:
        try:
            ray.get(reference, timeout=120)
            found.append(None)
        except Exception as error:
            found.append(_text(error))
    return tuple(found)


@contextmanager
def recorded(host: Harness) -> Iterator[list[Any]]:
    """Within the block, the list holds what the host's driver waits for while its workers train."""
    found: list[Any] = []
    original = host.policy.async_run_method

    def run(method_name: str, *args: Any, **kwargs: Any) -> Any:
        made = original(method_name, *args, **kwargs)
        if method_name == "fit":
            found[:] = made
        return made

    with mock.patch.object(host.policy, "async_run_method", run):
        yield found


@contextmanager
def _moved(host: Harness, trainer: Any) -> Iterator[None]:
    """Within the block, the policy leaves its old log-probs before it is trained, as in a second epoch."""
    original = trainer.experience_maker.make_experience_batch

    def then_move(samples: Any) -> Any:
        made = original(samples)
        host.ask(by_hand.move, 0.004)
        return made

    with mock.patch.object(trainer.experience_maker, "make_experience_batch", then_move):
        yield


@contextmanager
def _spoilt(host: Harness, rollouts: Rollouts, fault: Fault | None, *, training: bool = False) -> Iterator[Rollouts]:
    """Within the block, one log-prob is not finite; gives the rollouts to use."""
    if fault is None:
        yield rollouts
        return
    each = len(rollouts.rewards) // host.ranks
    sequence = fault.rank * each
    with ExitStack() as stack:
        if fault.whose == "sampler":
            rollouts = rollouts.with_log_prob(sequence, TOKEN, fault.value)
        elif fault.whose == "policy" and training:
            host.ask(remote.spoil_logits, fault.rank, TOKEN, fault.value)
        else:
            stack.enter_context(_spoilt_answers(rollouts, fault, sequence))
        yield rollouts


@contextmanager
def _spoilt_answers(rollouts: Rollouts, fault: Fault, sequence: int) -> Iterator[None]:
    """Within the block, one log-prob that the workers give for a rollout is not finite."""
    original, position = RemoteExperienceMaker._flatten_results, int(rollouts.masks[sequence].nonzero()[TOKEN])
    wanted = 1 if fault.whose == "reference" else 0
    calls = iter(range(100))

    def spoilt(maker: Any, refs: Any, factor: int) -> Any:
        found = original(maker, refs, factor)
        if next(calls) == wanted:
            batch = sequence // maker.args.rollout.micro_batch_size
            found[batch] = found[batch].clone()
            found[batch][0, position] = fault.value
        return found

    with mock.patch.object(RemoteExperienceMaker, "_flatten_results", spoilt):
        yield


def raw_engine(assets: Path) -> Any:
    """A real rollout actor that was started without a mode for log-probs; only its vLLM is not there."""
    host: Any = vllm_engine.RolloutRayActor.__ray_metadata__.modified_class

    class Engine(host):  # type: ignore[misc]
        async def __init__(self, **settings: Any) -> None:
            with mock.patch("vllm.AsyncLLMEngine.from_engine_args", return_value=mock.AsyncMock()):
                await super().__init__(**settings)

    settings = {"model": str(assets / "model"), "num_gpus": 0, "distributed_executor_backend": "ray"}
    return ray.remote(num_cpus=0)(Engine).remote(**settings)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _stock_outcome(metrics: list[dict[str, Any]], gradient: dict[str, torch.Tensor]) -> Outcome:
    shown = tuple(
        {key: value for key, value in step.items() if isinstance(value, float) and not key.startswith("timing/")}
        for step in metrics
    )
    assert all(math.isfinite(value) for step in shown for value in step.values())
    assert gradient is not None
    return Outcome((None,), True, shown, torch.cat([value.flatten() for value in gradient.values()]))


@pytest.fixture(scope="session")
def driver(assets, rollouts, harness, make_pair, request, tmp_path_factory):
    """The driver of the session."""
    folder = tmp_path_factory.mktemp("contract")
    return OpenRLHFDriver(assets, rollouts, harness, make_pair, lambda: request.getfixturevalue("stock"), folder)
