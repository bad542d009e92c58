"""Beta where veRL shapes rewards, and the files that hold the spec and controllers' states in veRL's checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.verl.host import SCORE_BETA
from kl_plugins.spec import KLSpec


class ScoreBeta:
    """Stands in for veRL's controller of the KL in reward: the spec's schedule, else veRL's own controller.

    Attributes:
        spec: a score spec.
        host: veRL's own controller.
        controller: of the spec's ``beta:`` option; it observes every rollout batch.
        pending: an ``@advantage`` penalty was computed, and no advantages have taken it yet.
    """

    def __init__(self, spec: KLSpec, host: Any, adaptive: bool = False) -> None:
        """Take over from veRL's controller.

        Args:
            spec: a score spec.
            host: veRL's own controller object.
            adaptive: whether that one changes its value, which then belongs into checkpoints.
        """
        self.spec, self.host, self._adaptive = spec, host, adaptive
        self.controller = Controller(spec.beta, float(host.value), SCORE_BETA)
        self.pending = False

    @property
    def value(self) -> float:
        """Beta to use now.

        Raises:
            BetaChangedError: veRL's coefficient was changed, and the spec controls beta itself.
        """
        return self.controller.beta(float(self.host.value))

    def update(self, current_kl: float, n_steps: int) -> None:
        """veRL calls this once per rollout batch; the spec's schedule uses the KL that it observed itself."""
        if self.spec.beta is None:
            self.host.update(current_kl=current_kl, n_steps=n_steps)
        else:
            self.controller.step()

    def saved(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {**self.controller.saved(), **({"host_value": float(self.host.value)} if self._adaptive else {})}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's state."""
        self.controller.restore(saved)
        if self._adaptive and saved is not None and "host_value" in saved:
            self.host.value = saved["host_value"]


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what :func:`kl_plugins.adapters.checkpoints.record` gave; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(state), encoding="utf-8")
    part.replace(path)


def read_state(path: Path) -> dict[str, Any] | None:
    """Read what :func:`write_state` wrote; None where there is nothing.

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
