"""The ``kl`` field: its text, and what is checked before any model is loaded."""

from __future__ import annotations

from typing import Any

from kl_plugins.adapters.trl import guards, unsloth
from kl_plugins.spec import KLSpec

FIELD = "kl"

HELP = (
    "KL spec of kl-plugins, <estimator>@<placement>[/<option>[:<value>]]..., for example k2@loss/is:token, or a preset "
    "such as default. It replaces TRL's own KL term; beta is its coefficient and must not be 0. null: stock TRL."
)


def parse(config: Any, algorithm: str) -> KLSpec | None:
    """The config's spec, checked against the rest of the config; None where there is none.

    Args:
        config: a GRPOConfig or RLOOConfig.
        algorithm: ``GRPO`` or ``RLOO``.

    Raises:
        KLSpecError: the text is not a valid spec.
        ValueError: the spec and other settings contradict each other.
        UnsupportedHostError: Unsloth is in this process, so the spec would have no effect.
    """
    text = getattr(config, FIELD, None)
    if text is None:
        return None
    spec = KLSpec.parse(text)
    unsloth.refuse(f"{FIELD}={text!r} cannot be used here")
    guards.check_config(spec, config, algorithm)
    return spec
