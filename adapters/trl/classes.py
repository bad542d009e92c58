"""TRL's classes with the ``kl`` field and its hooks, as subclasses; TRL's own stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import trl

from kl_plugins.adapters.trl import ADAPTER, unsloth
from kl_plugins.adapters.trl.config import HELP, TAKEN, is_taken

# This comes before classes are derived from what is no longer TRL's.
unsloth.refuse("kl_plugins.adapters.trl cannot derive its classes from TRL's")


class _OnlyForHookedTrainers:
    """Part of a config: a trainer without hooks, which would ignore ``kl``, cannot be built on it."""

    kl: str | None

    @property
    def place_model_on_device(self) -> Any:
        """TRL's own setting; transformers reads it while it builds a trainer, and hardly anything else does.

        Raises:
            RuntimeError: the trainer is one that would ignore ``kl``.
        """
        if self.kl is not None and not is_taken(self):
            raise RuntimeError(
                f"kl-plugins: kl={self.kl!r} is set, but this trainer would ignore it: it is not one of kl-plugins'. "
                "Use GRPOTrainer or RLOOTrainer of kl_plugins.adapters.trl, or call kl_plugins.adapters.trl.attach() "
                "before the trainer is built"
            )
        return super().place_model_on_device  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the note that a trainer has taken this config: the next one may be another."""
        return {name: value for name, value in vars(self).items() if name != TAKEN}


@dataclass
class GRPOConfig(_OnlyForHookedTrainers, trl.GRPOConfig):  # type: ignore[misc]
    """TRL's ``GRPOConfig`` with one more field.

    Args:
        kl: a KL spec, or None for stock TRL.

    Raises:
        KLSpecError: ``kl`` is not a valid spec.
        ValueError: ``kl`` contradicts another setting.
    """

    kl: str | None = field(default=None, metadata={"help": HELP})


@dataclass
class RLOOConfig(_OnlyForHookedTrainers, trl.RLOOConfig):  # type: ignore[misc]
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


cast(Any, ADAPTER.hooks).put_on(GRPOConfig, RLOOConfig, GRPOTrainer, RLOOTrainer)
