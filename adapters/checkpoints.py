"""What a checkpoint of any host holds of kl-plugins: the canonical spec and the state of the beta controller."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kl_plugins.spec import KLSpec

logger = logging.getLogger(__name__)

ALLOW_VARIABLE = "KL_PLUGINS_ALLOW_SPEC_CHANGE"
"""Environment variable: set to 1, a run may resume under another spec than its checkpoint's."""

SPEC, CONTROLLER = "spec", "controller"


class SpecChangedError(RuntimeError):
    """A run was resumed under another spec than that of its checkpoint."""


def record(spec: KLSpec | str, controller: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what goes into a checkpoint; plain data.

    Args:
        spec: the run's spec; a canonical text if the host has several.
        controller: the state of the run's beta controller.
    """
    return {SPEC: str(spec), CONTROLLER: None if controller is None else dict(controller)}


def resumed(saved: Mapping[str, Any] | None, spec: KLSpec | str) -> dict[str, Any] | None:
    """Return the controller's state of a checkpoint, after checking that it was written under the run's spec.

    Args:
        saved: what :func:`record` gave; None if the checkpoint holds nothing of kl-plugins.
        spec: the run's spec, as :func:`record` got it.

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
        if not allowed():
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


def allowed() -> bool:
    """Whether the user allows a run to change its regulariser when it resumes."""
    return os.environ.get(ALLOW_VARIABLE) == "1"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what :func:`record` gave to a JSON file. The file is complete or absent, never partial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(state), encoding="utf-8")
    part.replace(path)


def read_state(path: Path) -> dict[str, Any] | None:
    """Read what :func:`write_state` wrote; None if there is no file.

    Raises:
        ValueError: the file is there and damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"kl-plugins: {path} is damaged ({error}); delete it to start the beta controller again from its beginning"
        ) from None
    return state
