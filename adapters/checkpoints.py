"""What the hosts' checkpoints hold of kl-plugins: the canonical spec and the controller's state."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from kl_plugins.spec import KLSpec

logger = logging.getLogger(__name__)

ALLOW_VARIABLE = "KL_PLUGINS_ALLOW_SPEC_CHANGE"
"""Set to 1, a run may resume under another spec than its checkpoint's."""

SPEC, CONTROLLER = "spec", "controller"


class SpecChangedError(RuntimeError):
    """A run was resumed under another spec than that of its checkpoint."""


def record(spec: KLSpec | str, controller: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What goes into a checkpoint; plain data.

    Args:
        spec: the run's; a canonical text where a host has several.
        controller: the state of its beta controller.
    """
    return {SPEC: str(spec), CONTROLLER: None if controller is None else dict(controller)}


def resumed(saved: Mapping[str, Any] | None, spec: KLSpec | str) -> dict[str, Any] | None:
    """The controller's state in a checkpoint, once its spec has been found to be the run's.

    Args:
        saved: what :func:`record` gave; None where the checkpoint holds nothing of kl-plugins.
        spec: the run's, as :func:`record` got it.

    Raises:
        SpecChangedError: the checkpoint was written under another spec, and the user has not allowed that.
    """
    if saved is None or SPEC not in saved:
        logger.warning(
            "kl-plugins: the checkpoint holds no KL spec, so it was written without kl-plugins; from here on the run "
            "is regularised by %s",
            spec,
        )
        return None
    if saved[SPEC] != str(spec):
        if os.environ.get(ALLOW_VARIABLE) != "1":
            raise SpecChangedError(
                f"kl-plugins: the checkpoint was written under {saved[SPEC]}, and this run is configured with {spec}. "
                f"Resume with {saved[SPEC]}, start a new run, or set {ALLOW_VARIABLE}=1 to change the regulariser in "
                "the middle of this one"
            )
        logger.warning(
            "kl-plugins: the regulariser changes from %s to %s, as %s=1 allows", saved[SPEC], spec, ALLOW_VARIABLE
        )
    state: dict[str, Any] | None = saved.get(CONTROLLER)
    return state
