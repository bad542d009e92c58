"""Where kl-plugins goes into veRL: hooks that are put in as veRL imports its modules, and checked when a spec is used.

Until then nothing heavy is imported: the table of hooks comes with the first of veRL's training modules.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path
from typing import Any

import wrapt

from kl_plugins.adapters.verl import ADAPTER, HOST
from kl_plugins.patches.engine.on_import import ImportHooks

CONFIG = "verl.utils.config"
"""This module comes with veRL itself, in every process, so its one hook is here and not in the table."""


class ConfigHook(wrapt.FunctionWrapper):  # type: ignore[misc,type-arg,unused-ignore]
    """The hook around veRL's validation of its config."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickled by reference: a process without kl-plugins then gets veRL's own. Ray sends the legacy task runner by
        # value.
        return pkgutil.resolve_name, (f"{CONFIG}:validate_config",)


def _hook_config(module: Any) -> None:
    if not isinstance(module.validate_config, ConfigHook):
        module.validate_config = ConfigHook(module.validate_config, validate_config)


def validate_config(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around veRL's own validation, in the launching process: a wrong spec or setting costs seconds."""
    from kl_plugins.patches.engine.arguments import arguments

    ADAPTER.checked(arguments(wrapped, args, kwargs)["config"])
    return wrapped(*args, **kwargs)


class VerlHooks(ImportHooks):
    """The hooks of the table, and the one around veRL's validation."""

    def detach(self) -> None:
        """Restore veRL's original functions. Safe to call twice.

        Raises:
            RuntimeError: another package wrapped a hook.
        """
        super().detach()
        config: Any = sys.modules.get(CONFIG)
        if config is not None and isinstance(config.validate_config, ConfigHook):
            config.validate_config = config.validate_config.__wrapped__


HOOKS = VerlHooks(
    host=HOST,
    folder=Path(__file__).parent,
    modules=(
        "verl.trainer.ppo.core_algos",
        "verl.trainer.ppo.ray_trainer",
        "verl.trainer.ppo.v1.utils",
        "verl.trainer.ppo.v1.trainer_base",
        "verl.experimental.separation.ray_trainer",
        "verl.workers.utils.losses",
        "verl.workers.engine_workers",
    ),
    early={CONFIG: _hook_config},
)
"""The table in ``hooks.py`` names no other modules."""
