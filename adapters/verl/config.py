"""What veRL's config says: which key holds a spec, how losses are aggregated, how responses are sampled."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

from packaging.version import Version

from kl_plugins.adapters.base import parse
from kl_plugins.adapters.receipts import Statement
from kl_plugins.adapters.verl import LOSS_KEY, SCORE_KEY
from kl_plugins.aggregation import Aggregation, Kind
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec, looks_like_spec
from kl_plugins.spec.observation import looks_like_observation

KINDS: dict[str, Kind] = {
    "token-mean": "token mean",
    "token-sum": "token sum",
    "seq-mean-token-sum": "token sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "sequence mean",
}
"""What each ``loss_agg_mode`` does to the terms of a response."""

WIDTH_CAVEAT = (
    "with seq-mean-token-sum-norm and no actor_rollout_ref.actor.loss_scale_factor, veRL divides each micro-batch by "
    "its own width, in the v1 trainers the length of its longest response, so the result depends on micro-batching; "
    "set loss_scale_factor to data.max_response_length"
)


class Specs(NamedTuple):
    """The specs in a veRL config; None where the key holds one of veRL's own words."""

    loss: KLSpec | None
    score: KLSpec | None

    def __bool__(self) -> bool:
        return self.loss is not None or self.score is not None

    @property
    def text(self) -> str:
        """Both specs in one text, for checkpoints."""
        return " and ".join(str(spec) for spec in self if spec is not None)


def spec_in(key: str, text: Any) -> KLSpec | None:
    """Read the spec that a key holds; None for one of veRL's own estimator names, alone or with ``observe``.

    Raises:
        KLSpecError: the text is not a valid spec.
        ValueError: the spec belongs in the other key.
    """
    if looks_like_observation(text) or not looks_like_spec(text):
        return None
    spec = parse(text)
    home = LOSS_KEY if spec.placement == "loss" else SCORE_KEY
    if home != key:
        raise ValueError(f"kl-plugins: {spec} is a @{spec.placement} spec and cannot work in {key}; put it into {home}")
    return spec


def aggregation_of(actor: Any, placement: str) -> Aggregation:
    """Say how veRL turns per-token terms into one number.

    Args:
        actor: veRL's actor config, a dataclass in a worker or a ``DictConfig``.
        placement: of the spec. Penalties in the reward or advantage are aggregated by the policy loss.

    Raises:
        ValueError: an aggregation that is not known.
    """
    mode = str(actor.loss_agg_mode)
    setting = f"actor_rollout_ref.actor.loss_agg_mode={mode}"
    if placement != "loss":
        loss = str(actor.policy_loss.get("loss_mode", "vanilla"))
        if loss in _means_of_sequences():
            return Aggregation("sequence mean", f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
    if mode not in KINDS:
        raise ValueError(f"kl-plugins: {setting} is not known; use one of {', '.join(KINDS)}")
    return Aggregation(KINDS[mode], setting)


def statement_of(
    spec: KLSpec, actor: Any, behaviour: str = "unused", sampling: Sampling | None = None, **further: str
) -> Statement:
    """Collect what veRL's settings make of a spec, for receipts.

    Args:
        spec: what the user named.
        actor: veRL's actor config, a dataclass in a worker or a ``DictConfig``.
        behaviour: where the behaviour policy's log-probs come from.
        sampling: how responses are sampled; None in a worker, which does not know.
        **further: ``reward_site`` and ``cost`` of the statement.
    """
    by_width = str(actor.loss_agg_mode) == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None
    caveats = (WIDTH_CAVEAT,) if by_width else ()
    return Statement(aggregation_of(actor, spec.placement), behaviour, sampling, caveats, **further)


def _means_of_sequences() -> tuple[str, ...]:
    """Policy losses that average over each response whatever ``loss_agg_mode`` says."""
    always = ("sapo", "geo_mean")
    return always if Version(version("verl")) >= Version("0.9.1") else (*always, "gspo")


def logprobs_mode(config: Any) -> tuple[str, str]:
    """Name the setting that says which log-probs the rollout engine reports, and its value in vLLM's words.

    Args:
        config: veRL's ``DictConfig``.
    """
    rollout = config.actor_rollout_ref.rollout
    name = str(rollout.get("name"))
    engine = (rollout.get("engine_kwargs") or {}).get(name) or {}
    if engine.get("logprobs_mode"):  # goes before veRL's own
        return f"actor_rollout_ref.rollout.engine_kwargs.{name}.logprobs_mode", str(engine["logprobs_mode"])
    # Where veRL passes none, vLLM reports raw ones.
    return "actor_rollout_ref.rollout.logprobs_mode", str(rollout.get("logprobs_mode") or "raw_logprobs")


def sampling_of(config: Any) -> Sampling:
    """Read how veRL samples responses for training.

    Args:
        config: veRL's ``DictConfig``.
    """
    rollout = config.actor_rollout_ref.rollout
    setting, mode = logprobs_mode(config)
    return Sampling(
        temperature=float(rollout.temperature),
        top_p=float(rollout.top_p),
        top_k=int(rollout.top_k),
        min_p=float(rollout.get("min_p") or 0.0),
        penalised=float(rollout.get("repetition_penalty") or 1.0) != 1.0,
        raw=mode != "processed_logprobs",
        logprobs_setting=setting,
    )


def bypasses(config: Any) -> bool:
    """Whether veRL takes the sampler's log-probs as the old ones instead of computing its own."""
    correction = config.algorithm.get("rollout_correction", None)
    return bool(correction and correction.get("bypass_mode", False))


def behaviour_source(spec: KLSpec, config: Any) -> str:
    """Say where the behaviour policy's log-probs come from: ``sampler``, ``old`` or ``unused``.

    Args:
        spec: a ``@loss`` spec.
        config: veRL's ``DictConfig``.
    """
    if not spec.needs_behaviour:
        return "unused"
    if bypasses(config):
        return "sampler"  # under behaviour:old too, because old equals rollout then
    sampled = bool(config.actor_rollout_ref.rollout.calculate_log_probs)
    return "sampler" if sampled and spec.behaviour != "old" else "old"


def estimator_of(algorithm: Any) -> str:
    """Return the name of the advantage estimator, which veRL has as a text or as a member of an enumeration."""
    return str(getattr(algorithm.adv_estimator, "value", algorithm.adv_estimator))
