"""What veRL's config says: which key holds a spec, how losses are aggregated, how responses are sampled."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

from packaging.version import Version

from kl_plugins.adapters.verl.host import LOSS_KEY, SCORE_KEY
from kl_plugins.aggregation import Aggregation, Kind
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec, looks_like_spec

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
    """What a veRL config asks for; None where the key holds one of veRL's own words."""

    loss: KLSpec | None
    score: KLSpec | None

    def __bool__(self) -> bool:
        return self.loss is not None or self.score is not None

    @property
    def text(self) -> str:
        """Both in one text, for checkpoints."""
        return " and ".join(str(spec) for spec in self if spec is not None)


parse = lru_cache(maxsize=64)(KLSpec.parse)
"""A worker reads the same text for every micro-batch."""


def specs_of(config: Any) -> Specs:
    """The specs of a whole veRL config, each in the key where it belongs.

    Args:
        config: veRL's ``DictConfig``.

    Raises:
        KLSpecError: a text is not a valid spec.
        ValueError: a spec in the wrong key; the message names the right one.
    """
    loss = spec_in(LOSS_KEY, config.actor_rollout_ref.actor.get("kl_loss_type"))
    score = spec_in(SCORE_KEY, config.algorithm.get("kl_penalty"))
    return Specs(loss, score)


def spec_in(key: str, text: Any) -> KLSpec | None:
    """The spec that a key holds, or None for one of veRL's own estimator names.

    Raises:
        KLSpecError: the text is not a valid spec.
        ValueError: the spec belongs into the other key.
    """
    if not looks_like_spec(text):
        return None
    spec = parse(text)
    home = LOSS_KEY if spec.placement == "loss" else SCORE_KEY
    if home != key:
        raise ValueError(f"kl-plugins: {spec} is a @{spec.placement} spec and cannot work in {key}; put it into {home}")
    return spec


def loss_spec(actor_config: Any) -> KLSpec | None:
    """The ``@loss`` spec of an actor's dataclass config, as a worker has it; None for stock veRL."""
    if not getattr(actor_config, "use_kl_loss", False):
        return None
    return spec_in(LOSS_KEY, getattr(actor_config, "kl_loss_type", None))


def aggregation_of(actor: Any, placement: str) -> Aggregation:
    """How veRL turns per-token terms into one number.

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


def aggregation_caveats(actor: Any, placement: str) -> tuple[str, ...]:
    """What a reader of the target has to know about the aggregation; the arguments are those above."""
    by_width = str(actor.loss_agg_mode) == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None
    return (*aggregation_of(actor, placement).caveats, *((WIDTH_CAVEAT,) if by_width else ()))


def _means_of_sequences() -> tuple[str, ...]:
    """Policy losses that average over each response whatever ``loss_agg_mode`` says."""
    always = ("sapo", "geo_mean")
    return always if Version(version("verl")) >= Version("0.9.1") else (*always, "gspo")


def logprobs_mode(config: Any) -> tuple[str, str]:
    """The setting that says which log-probs the rollout engine reports, and its value in vLLM's words.

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
    """How veRL samples responses for training.

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
