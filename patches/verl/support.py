"""Whether this process and this config are ones that the hooks were checked with; asked when a spec is used."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kl_plugins.patches import verl
from kl_plugins.patches.patch import ALLOW_UNTESTED, Hook, UnsupportedHostError, check_version

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
    from kl_plugins.patches.verl.targets import PATCHES

    check_version(PATCHES.distribution, PATCHES.supported)
    if verl.failures:
        raise UnsupportedHostError(
            f"kl-plugins: could not attach to veRL {version('verl')}: "
            + "; ".join(verl.failures)
            + ". Run `kl-plugins doctor`"
        )
    imported = [patch for patch in PATCHES.patches if patch.module in sys.modules]
    PATCHES.check(imported)
    for patch in imported:
        if not isinstance(vars(patch.owner()).get(patch.attribute), Hook):
            raise UnsupportedHostError(
                f"kl-plugins: {patch.module}.{patch.qualname} has no hook in this process: something replaced it, or "
                "kl-plugins was detached. A KL spec would have no effect there"
            )


def check_sources() -> None:
    """Raise where veRL's files are not those that were checked; reads them, so that the launching process finds out.

    Raises:
        UnsupportedHostError: a function that is wrapped in some process has changed.
    """
    from kl_plugins.patches.verl.fingerprints import expected

    for name, known in expected(version("verl")).items():
        digest = _digests()[name]
        if digest not in known.values():
            _refuse(
                f"{name.replace(':', '.')} of verl {version('verl')} is not the code that kl-plugins was checked with "
                f"(fingerprint {digest}); it was edited, or this is another version"
            )


@cache
def _digests() -> dict[str, str | None]:
    from kl_plugins.patches.verl.fingerprints import read_fingerprints

    return read_fingerprints(installed_folder())


def installed_folder() -> Path:
    """Where veRL's package lies, without importing it.

    Raises:
        ModuleNotFoundError: nowhere.
    """
    spec = PathFinder.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("kl-plugins: veRL's package folder is not importable; reinstall verl")
    return Path(next(iter(spec.submodule_search_locations)))


def check_engine(config: Any) -> None:
    """Raise where the config picks parts of veRL that the hooks were not run with.

    Raises:
        UnsupportedHostError: the part, by name.
    """
    for problem in _untested(config):
        _refuse(problem)


def check_trainer(trainer: type) -> None:
    """Raise for a trainer class that was not tested: it may go around the hooks.

    Raises:
        UnsupportedHostError: the class, by name.
    """
    name = f"{trainer.__module__}.{trainer.__qualname__}"
    if name not in TRAINERS:
        _refuse(f"the trainer {name} was not tested with kl-plugins (tested: {', '.join(TRAINERS)})")


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


def _refuse(problem: str) -> None:
    if os.environ.get(ALLOW_UNTESTED) == "1":
        warnings.warn(f"kl-plugins: {problem}; going on because {ALLOW_UNTESTED}=1", RuntimeWarning, stacklevel=3)
        return
    raise UnsupportedHostError(
        f"kl-plugins: {problem}. Or set {ALLOW_UNTESTED}=1 in every process and check the run's kl/ metrics yourself."
    )
