"""TRL's classes with the ``kl`` field and its hooks, as subclasses; TRL's own stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import trl

from kl_plugins.adapters.trl.config import HELP
from kl_plugins.patches.trl import targets


@dataclass
class GRPOConfig(trl.GRPOConfig):  # type: ignore[misc]
    """TRL's ``GRPOConfig`` with one more field.

    Args:
        kl: a KL spec, or None for stock TRL.

    Raises:
        KLSpecError: ``kl`` is not a valid spec.
        ValueError: ``kl`` contradicts another setting.
    """

    kl: str | None = field(default=None, metadata={"help": HELP})


@dataclass
class RLOOConfig(trl.RLOOConfig):  # type: ignore[misc]
    """TRL's ``RLOOConfig`` with one more field.

    Args:
        kl: a KL spec, or None for stock TRL.

    Raises:
        KLSpecError: ``kl`` is not a valid spec.
        ValueError: ``kl`` contradicts another setting.
    """

    kl: str | None = field(default=None, metadata={"help": HELP})


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's ``GRPOTrainer``; trains under ``args.kl`` where that is set."""


class RLOOTrainer(trl.RLOOTrainer):  # type: ignore[misc]
    """TRL's ``RLOOTrainer``; trains under ``args.kl`` where that is set."""


targets.on_subclass(GRPOConfig, targets.GRPO_CONFIG)
targets.on_subclass(RLOOConfig, targets.RLOO_CONFIG)
targets.on_subclass(GRPOTrainer, targets.GRPO_TRAINER)
targets.on_subclass(RLOOTrainer, targets.RLOO_TRAINER)
