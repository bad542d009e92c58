"""The specs in a veRL config: which key holds one, and whether it is a key where that spec can work."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from kl_plugins.adapters.verl.host import LOSS_KEY, SCORE_KEY
from kl_plugins.spec import KLSpec, looks_like_spec


class Specs(NamedTuple):
    """What a veRL config asks for; None where the key holds one of veRL's own words."""

    loss: KLSpec | None
    score: KLSpec | None

    def __bool__(self) -> bool:
        return self.loss is not None or self.score is not None


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
