"""``observe`` in veRL: which key asks for it, the spec that equals veRL's own KL, and what cannot be observed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch import Tensor

from kl_plugins.adapters.base import parse, parse_observation
from kl_plugins.adapters.explained.run import Term, settings_of
from kl_plugins.adapters.metrics import joined, sums_and_maxima
from kl_plugins.adapters.micro_batch import KLSource
from kl_plugins.adapters.observe import HostKL, measured
from kl_plugins.adapters.verl import HOST, LOSS_BETA, LOSS_KEY, SCORE_BETA, SCORE_KEY
from kl_plugins.adapters.verl.batch import MASK, SAMPLER
from kl_plugins.adapters.verl.config import behaviour_source, bypasses, sampling_of
from kl_plugins.adapters.verl.refusals import exact_problems
from kl_plugins.probe import HostTerm
from kl_plugins.spec.observation import Observation, looks_like_observation

USE_LOSS, USE_REWARD = "actor_rollout_ref.actor.use_kl_loss", "algorithm.use_kl_in_reward"


@dataclass(frozen=True)
class Observed:
    """What a veRL config asks to observe.

    Attributes:
        key: the setting that holds the text.
        observation: with veRL's word and the spec filled in.
        equal: whether the spec has the gradient of veRL's own KL, where the user named none.
    """

    key: str
    observation: Observation
    equal: bool = True

    @property
    def in_loss(self) -> bool:
        """Whether veRL's own KL is in the loss."""
        return self.key == LOSS_KEY


def observed_in(key: str, text: Any, settings: dict[str, Any] | None = None) -> Observed | None:
    """Read a key that may hold a text with ``observe``.

    Args:
        key: ``kl_loss_type`` or ``kl_penalty``, with its dots.
        text: its value.
        settings: further settings that matter for veRL's own KL, by key.

    Returns:
        The observation, with veRL's own word; None for everything else.

    Raises:
        KLSpecError: the text is not valid.
    """
    if not looks_like_observation(text):
        return None
    found = parse_observation(text)
    found = replace(found, native=found.native or default_word(key))
    term = native_term(key, str(found.native), settings or {})
    equal = term is not None and term.equal
    return Observed(key, found.of(parse("k3@loss") if term is None else term.spec), equal)


def default_word(key: str) -> str:
    """Return the estimator that veRL uses if a key is not set, from the class that holds veRL's default.

    Args:
        key: the key.
    """
    if key == LOSS_KEY:
        from verl.workers.config import ActorConfig

        return str(ActorConfig.kl_loss_type)
    from verl.trainer.config import AlgoConfig

    return str(AlgoConfig.kl_penalty)


def native_term(key: str, word: str, settings: dict[str, Any]) -> Term | None:
    """Return veRL's own KL term under one of its words; None if veRL has no such word.

    Args:
        key: the key that holds the word.
        word: veRL's word.
        settings: further settings by key.
    """
    from kl_plugins.adapters.verl.explained import VerlRun

    # What the term is does not depend on its coefficient, and a run with the coefficient 0 is observed as well.
    switched_on = {USE_LOSS: key == LOSS_KEY, USE_REWARD: key == SCORE_KEY, LOSS_BETA: 1.0, SCORE_BETA: 1.0}
    run = VerlRun(HOST, Version(version(HOST.distribution)), settings_of({**settings, **switched_on, key: word}))
    return next(iter(run.terms), None)


def observation_of(config: Any) -> Observed | None:
    """Read what a whole veRL config asks to observe; the loss before the reward.

    Args:
        config: veRL's ``DictConfig``.
    """
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    return observed_in(LOSS_KEY, actor.get("kl_loss_type")) or observed_in(SCORE_KEY, algorithm.get("kl_penalty"))


def problems(found: Observed, config: Any) -> Iterator[str]:
    """Give each reason why a run cannot be observed.

    Args:
        found: what the config asks for.
        config: veRL's ``DictConfig``.
    """
    spec, word = found.observation.measured, str(found.observation.native)
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if native_term(found.key, word, {}) is None:
        yield (
            f"{word!r} before observe is not one of veRL's estimators; use kl, abs, mse, low_var_kl (or k1, k2, k3), "
            f"or leave it out for {default_word(found.key)}"
        )
    other = algorithm.get("kl_penalty") if found.in_loss else actor.get("kl_loss_type")
    if looks_like_observation(other) or "@" in str(other):
        yield (
            f"{SCORE_KEY if found.in_loss else LOSS_KEY}={other} has kl/ metrics as well, and they would overwrite "
            "each other; observe in one of the two keys, beside one of veRL's own words in the other"
        )
    if found.in_loss and not actor.use_kl_loss:
        yield (
            f"{USE_LOSS} is False, so veRL computes no KL in the loss; set it to True, with {LOSS_BETA}=0 if the run "
            f"is to train without that KL, or observe in {SCORE_KEY} if the KL is in the reward"
        )
    if not found.in_loss and not algorithm.use_kl_in_reward:
        yield f"{USE_REWARD} is False, so veRL computes no KL in the reward; set it to True, or observe in {LOSS_KEY}"
    if spec.needs_exact and found.in_loss:
        yield from exact_problems(spec, config)
    elif spec.needs_exact:
        yield (
            "exact terms need the policy's logits, which veRL's trainer process never has; use a sampled spec, "
            f"such as k2@loss/is:token, or put veRL's KL into the loss and observe in {LOSS_KEY}"
        )
    if not found.in_loss and bypasses(config):
        yield (
            "algorithm.rollout_correction.bypass_mode=True puts the engine's log-probs in place of the trainer's, so "
            f"the KL would hold their mismatch; set bypass_mode=False, or observe in {LOSS_KEY}"
        )
    sampled = bool(config.actor_rollout_ref.rollout.calculate_log_probs)
    if spec.behaviour == "sampler" and not sampled:
        yield (
            "behaviour:sampler needs the sampler's log-probs; set actor_rollout_ref.rollout.calculate_log_probs=True, "
            "or leave behaviour out (the weight then divides by the trainer's old log-probs)"
        )
    yield from sampling_of(config).problems(spec, behaviour_source(spec, config))


@dataclass
class ScoreObservation:
    """What veRL's trainer carries while the KL in its rewards is observed.

    Attributes:
        observed: what is observed.
        source: whose log-probs the weight divides by.
        truncated: see :func:`kl_plugins.adapters.observe.measured`.
        rollouts: number of rollout batches so far; every one of them is a step of the probes.
    """

    observed: Observed
    source: str
    truncated: bool
    rollouts: int = 0

    @classmethod
    def of(cls, observed: Observed, config: Any) -> ScoreObservation:
        """Begin a run.

        Args:
            observed: what is observed.
            config: veRL's ``DictConfig``.
        """
        source = behaviour_source(observed.observation.measured, config)
        return cls(observed, source, sampling_of(config).shows_kept_mass)

    def begin(self, batch: Any) -> ScoreMeasurement:
        """Begin the reward shaping of a rollout batch.

        Args:
            batch: veRL's padded batch.
        """
        self.rollouts += 1
        return ScoreMeasurement(self, batch)


class ScoreMeasurement(KLSource):
    """The reward shaping of one rollout batch whose KL is observed; the policy is that of the rollout.

    Args:
        watching: what the trainer carries.
        batch: veRL's padded batch.
    """

    def __init__(self, watching: ScoreObservation, batch: Any) -> None:
        self.watching = watching
        self.mask: Tensor = batch[MASK].bool()
        self.sampler = batch[SAMPLER] if SAMPLER in batch.keys() else None  # noqa: SIM118  TensorDict has no plain `in`
        self.metrics: dict[str, Tensor] | None = None

    def observe(self, logp: Tensor, ref_logp: Tensor, host: HostKL | HostTerm | None = None) -> None:
        """Measure the observed spec on the log-probs of the rollout; see the base class."""
        watching, observation = self.watching, self.watching.observed.observation
        self.metrics, self.mask = measured(
            observation.measured,
            logp,
            ref_logp,
            self.mask,
            old=logp,
            sampler=self.sampler,
            source=watching.source,
            probing=observation.probes(watching.rollouts),
            host=host,
            in_loss=False,
            truncated=watching.truncated,
        )

    def found(self, beta: float) -> dict[str, float]:
        """Return the ``kl/`` metrics; none where veRL did not ask for its KL.

        Args:
            beta: the coefficient of veRL's own KL in this batch.
        """
        if self.metrics is None:
            return {}
        parts = sums_and_maxima(self.metrics, self.mask, beta)
        return joined(*({key: value.item() for key, value in part.items()} for part in parts))
