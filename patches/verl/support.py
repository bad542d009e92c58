"""Whether this process and this config are ones that the hooks were checked with; asked when a spec is used."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

from kl_plugins.adapters.diagnosis import installed_folder
from kl_plugins.patches import checks
from kl_plugins.patches.fingerprint import fingerprints_in_folder
from kl_plugins.patches.verl import HOOKS
from kl_plugins.patches.verl.fingerprints import FINGERPRINTS, expected

ENGINES = ("fsdp", "fsdp2")
"""Training engines (``actor.strategy``) that share the engine the tests run."""

TRAINERS = (
    "verl.trainer.ppo.ray_trainer.RayPPOTrainer",
    "verl.trainer.ppo.v1.trainer_sync.PPOTrainerSync",
)
"""Trainer classes that the tests run."""

MODES = ("sync",)
"""The same as ``trainer.v1.trainer_mode``."""


def check_process() -> None:
    """Raise unless every hook that this process needs is in, on a veRL that was checked.

    Raises:
        UnsupportedHostError: unknown version, changed source, or a hook that is not in.
    """
    checks.check_process(HOOKS.patches(), HOOKS.failures, HOOKS.host)


def check_sources() -> None:
    """Raise where veRL's files are not those that were checked; reads them, so that the launching process finds out.

    Raises:
        UnsupportedHostError: a function that is wrapped in some process has changed.
    """
    checks.check_digests("verl", _digests(), expected(version("verl")))


@cache
def _digests() -> dict[str, str | None]:
    return fingerprints_in_folder(installed_folder("verl"), FINGERPRINTS)


def check_engine(config: Any) -> None:
    """Raise where the config picks parts of veRL that the hooks were not run with.

    Raises:
        UnsupportedHostError: the part, by name.
    """
    for problem in _untested(config):
        checks.refuse_untested(problem)


def check_trainer(trainer: type) -> None:
    """Raise for a trainer class that was not tested: it may go around the hooks.

    Raises:
        UnsupportedHostError: the class, by name.
    """
    name = f"{trainer.__module__}.{trainer.__qualname__}"
    if name not in TRAINERS:
        checks.refuse_untested(f"the trainer {name} was not tested with kl-plugins (tested: {', '.join(TRAINERS)})")


def _untested(config: Any) -> Iterator[str]:
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    if actor.strategy not in ENGINES:
        yield (
            f"the engine actor_rollout_ref.actor.strategy={actor.strategy} was not tested "
            f"(tested: {', '.join(ENGINES)})"
        )
    if model.get("use_fused_kernels", False):
        yield (
            "actor_rollout_ref.model.use_fused_kernels=True computes log-probs in a kernel that was not tested; "
            "set it to False"
        )
    if actor.get("use_prefix_grouper", False):
        yield "actor_rollout_ref.actor.use_prefix_grouper=True was not tested; set it to False"
    if actor.get("ulysses_sequence_parallel_size", 1) > 1:
        yield "actor_rollout_ref.actor.ulysses_sequence_parallel_size > 1 was not tested; set it to 1"
    if (config.get("distillation") or {}).get("enabled", False):
        yield "distillation.enabled=True puts another loss around the PPO loss, which was not tested; set it to False"
    trainer = config.trainer
    if trainer.get("use_v1", False) and trainer.v1.trainer_mode not in MODES:
        yield f"trainer.v1.trainer_mode={trainer.v1.trainer_mode} was not tested (tested: {', '.join(MODES)})"
