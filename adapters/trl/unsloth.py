"""Unsloth puts rewritten trainers in the place of TRL's: this module finds it by name and refuses specs beside it.

Its trainers compute loss and KL in code of their own, made from TRL's source as text. They call none of our hooks, so a
spec would be ignored. Nothing of Unsloth is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from kl_plugins.adapters.versions import UnsupportedHostError

NAME = "unsloth"

PLACES = {
    "trl": ("GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer"),
    "trl.trainer.grpo_config": ("GRPOConfig",),
    "trl.trainer.grpo_trainer": ("GRPOConfig", "GRPOTrainer"),
    "trl.trainer.rloo_config": ("RLOOConfig",),
    "trl.trainer.rloo_trainer": ("RLOOConfig", "RLOOTrainer"),
}
"""Names under which TRL's classes are found, by module."""

REMEDY = (
    "To train under a KL spec, start a process that does not import Unsloth, and load the model with transformers "
    "(peft gives LoRA, use_vllm gives fast generation). To train with Unsloth, remove the spec: Unsloth's own KL is "
    "then used"
)


def problem() -> str | None:
    """Say what Unsloth has done in this process, as the middle of a sentence; None if it is absent."""
    found = next(_rewritten(), None)
    if found is not None:
        place, cls = found
        return (
            f"Unsloth has replaced {place} by its own {cls.__qualname__}, which computes loss and KL itself and calls "
            "none of kl-plugins' hooks"
        )
    if NAME in sys.modules:
        return (
            "Unsloth is imported in this process; it replaces TRL's trainers and the forward pass of models by its "
            "own, which compute loss and KL themselves and call none of kl-plugins' hooks"
        )
    return None


def refuse(subject: str) -> None:
    """Raise if Unsloth is in this process.

    Args:
        subject: what cannot be done, as the beginning of a sentence: ``kl='k2@loss' cannot be used here``.

    Raises:
        UnsupportedHostError: Unsloth is imported, or one of TRL's classes is Unsloth's. No setting allows it: the spec
            would have no effect.
    """
    found = problem()
    if found is None:
        return
    raise UnsupportedHostError(f"kl-plugins: {subject}: {found}. {REMEDY}.")


def _rewritten() -> Iterator[tuple[str, type]]:
    # Looks only at names that are there already: reading a name of TRL's lazy module would import its trainers.
    for module, names in PLACES.items():
        present = vars(sys.modules[module]) if module in sys.modules else {}
        for name in names:
            found = present.get(name)
            if isinstance(found, type) and any(_of_unsloth(cls) for cls in found.__mro__):
                yield f"{module}.{name}", found


def _of_unsloth(cls: type) -> bool:
    return NAME in f"{cls.__module__}.{cls.__qualname__}".lower()
