"""Where kl-plugins goes into veRL: hooks that are put in as veRL imports its modules, and checked when a spec is used.

Until then nothing heavy is imported: the table of hooks comes with the first of veRL's training modules.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from typing import Any

import wrapt

logger = logging.getLogger(__name__)

MODULES = (
    "verl.trainer.ppo.core_algos",
    "verl.trainer.ppo.ray_trainer",
    "verl.trainer.ppo.v1.utils",
    "verl.trainer.ppo.v1.trainer_base",
    "verl.workers.utils.losses",
    "verl.workers.engine_workers",
)
"""veRL's modules that have hooks; the table in ``targets`` names no others."""

CONFIG = "verl.utils.config"
"""Comes with veRL itself, in every process, so its one hook stands here and not in the table."""

failures: list[str] = []
"""Hooks that could not be put in. A process without a spec must go on, so they are raised when a spec is used."""

_attached = False


class ConfigHook(wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]
    """The hook around veRL's validation of its config."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By reference: a process without kl-plugins then gets veRL's own. Ray sends the legacy task runner by value.
        return pkgutil.resolve_name, (f"{CONFIG}:validate_config",)


def attach() -> None:
    """Put the hooks into veRL, now where it is imported and later where it is not. Safe to call twice."""
    global _attached
    if _attached:
        return
    _attached = True
    logger.info("kl-plugins: hooks for %d modules of veRL registered", len(MODULES))
    for module in (CONFIG, *MODULES):
        wrapt.register_post_import_hook(_imported, module)


def detach() -> None:
    """Restore veRL's original functions. Safe to call twice.

    Raises:
        RuntimeError: somebody wrapped a hook again.
    """
    global _attached
    _attached = False
    from kl_plugins.patches.verl.targets import PATCHES

    PATCHES.undo()
    config: Any = sys.modules.get(CONFIG)
    if config is not None and isinstance(config.validate_config, ConfigHook):
        config.validate_config = config.validate_config.__wrapped__


def _imported(module: Any) -> None:
    if not _attached:
        return
    try:
        if module.__name__ == CONFIG:
            module.validate_config = ConfigHook(module.validate_config, _validate_config)
            return
        from kl_plugins.patches.verl.targets import PATCHES

        PATCHES.apply_to(module.__name__)
    except Exception as error:
        failures.append(f"{module.__name__}: {type(error).__name__}: {error}")
        logger.error("kl-plugins: not attached to %s; a KL spec will be refused: %s", module.__name__, error)


def _validate_config(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from kl_plugins.patches.verl.trainer import validate_config

    return validate_config(wrapped, instance, args, kwargs)
