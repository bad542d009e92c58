"""``observe`` in OpenRLHF: the spec that equals its own KL, what cannot be observed, and the KL of a rollout batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch import Tensor

from kl_plugins.adapters.base import parse, parse_observation
from kl_plugins.adapters.explained.run import Term, settings_of
from kl_plugins.adapters.metrics import Accumulator
from kl_plugins.adapters.micro_batch import KLSource
from kl_plugins.adapters.observe import HostKL, measured
from kl_plugins.adapters.openrlhf import COEFFICIENT_FLAG, HOST, LOSS_FLAG
from kl_plugins.adapters.openrlhf.batch import unmarked
from kl_plugins.adapters.openrlhf.config import behaviour_source, corrects_policy_loss, sampling_of
from kl_plugins.adapters.openrlhf.refusals import exact_problems
from kl_plugins.probe import HostTerm
from kl_plugins.spec.observation import Observation, looks_like_observation

WORDS = ("k1", "k2", "k3")
"""OpenRLHF's own estimators."""


def observation_of(args: Any) -> Observation | None:
    """Read what a run is asked to observe, with OpenRLHF's own word and the spec filled in; None if nothing.

    Args:
        args: OpenRLHF's nested arguments.

    Raises:
        KLSpecError: the text is not valid.
    """
    if not looks_like_observation(args.algo.kl.estimator):
        return None
    found = parse_observation(args.algo.kl.estimator)
    found = replace(found, native=found.native or default_word())
    term = native_term(found, args)
    return found.of(parse("k3@loss") if term is None else term.spec)


def default_word() -> str:
    """Return OpenRLHF's default estimator.

    Its parser is built inside a script and cannot be asked; a test compares this default with the script.
    """
    from kl_plugins.adapters.openrlhf.explained import ESTIMATOR
    from kl_plugins.adapters.openrlhf.explained.defaults import defaults

    return str(defaults(Version(version(HOST.distribution)))[ESTIMATOR])


def native_term(observation: Observation, args: Any) -> Term | None:
    """Return OpenRLHF's own KL term; None if it has no such estimator.

    Args:
        observation: what the run is asked for, with OpenRLHF's own word.
        args: OpenRLHF's nested arguments.
    """
    from kl_plugins.adapters.openrlhf.explained import COEFFICIENT, ESTIMATOR, OpenRLHFRun

    run = OpenRLHFRun(HOST, Version(version(HOST.distribution)), settings_of({}))
    values = {key: value for key in run.defaults if (value := _value(args, key)) is not None}
    # What the term is does not depend on its coefficient.
    run.settings = settings_of({**values, ESTIMATOR: observation.native, COEFFICIENT: 1.0})
    return next(iter(run.terms), None)


def _value(args: Any, key: str) -> Any:
    for name in key.split("."):
        args = getattr(args, name, None)
    return args


def problems(observation: Observation, args: Any) -> Iterator[str]:
    """Give each reason why a run cannot be observed.

    Args:
        observation: what the run is asked for.
        args: OpenRLHF's nested arguments.
    """
    spec = observation.measured
    if observation.native not in WORDS:
        yield (
            f"{observation.native!r} before observe is not one of OpenRLHF's estimators; use {', '.join(WORDS)}, or "
            f"leave it out for {default_word()}"
        )
    if args.algo.kl.init_coef == 0:
        yield (
            f"{COEFFICIENT_FLAG} is 0, so OpenRLHF loads no reference model and computes no KL; set it to a very small "
            "number, such as 1e-10, to observe a run that trains without a KL"
        )
    if spec.needs_exact and not args.algo.kl.use_loss:
        yield (
            "exact terms need the policy's logits, which OpenRLHF has only while it trains, and its KL is in the "
            f"reward; use a sampled spec, such as k2@loss/is:token, or add {LOSS_FLAG}"
        )
    elif spec.needs_exact:
        yield from exact_problems(spec, args)
    if spec.behaviour == "sampler" and not corrects_policy_loss(args):
        yield (
            "behaviour:sampler needs the log-probs of vLLM, for which OpenRLHF does not ask by itself; set "
            "--algo.advantage.is_correction_level, or leave behaviour out (the old log-probs are then used)"
        )
    yield from sampling_of(args).problems(spec, behaviour_source(spec, args))


class RolloutMeasurement(KLSource):
    """The KL of rollout batches, for which OpenRLHF asks once per batch of samples, in order; it is observed.

    Attributes:
        metrics: of the rollout batches since the last report.
        rollouts: number of rollout batches so far; every one of them is a step of the probes.
    """

    def __init__(self, observation: Observation, args: Any) -> None:
        """Begin a run.

        Args:
            observation: what is observed.
            args: OpenRLHF's nested arguments.
        """
        self.observation, self.source = observation, behaviour_source(observation.measured, args)
        self.truncated = sampling_of(args).shows_kept_mass and corrects_policy_loss(args)
        self.metrics, self.rollouts, self.beta = Accumulator(), 0, 0.0
        self._rest: list[Any] = []

    def begin(self, samples: Sequence[Any], beta: float) -> None:
        """Begin a rollout batch.

        Args:
            samples: OpenRLHF's ``Experience`` of each batch of samples.
            beta: the coefficient of OpenRLHF's own KL.
        """
        self.rollouts, self.beta, self._rest = self.rollouts + 1, beta, list(samples)

    def observe(self, logp: Tensor, ref_logp: Tensor, host: HostKL | HostTerm | None = None) -> None:
        """Measure the observed spec on the log-probs of the next batch of samples; see the base class."""
        if not self._rest:
            return
        samples = self._rest.pop(0)
        found = measured(
            self.observation.measured,
            logp,
            ref_logp,
            samples.action_mask.bool(),
            old=logp,
            sampler=unmarked(samples.rollout_log_probs, logp, required=False),
            source=self.source,
            probing=self.observation.probes(self.rollouts),
            host=host,
            in_loss=False,
            truncated=self.truncated,
        )
        self.metrics.add(found.metrics, found.kept, self.beta)
