"""Beta where veRL shapes rewards, and the files that hold controllers' states in veRL's checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kl_plugins.adapters.beta import restored
from kl_plugins.controllers import init, update
from kl_plugins.spec import KLSpec


class ScoreBeta:
    """Stands in for veRL's controller of the KL in reward: the spec's schedule, else veRL's own."""

    def __init__(self, spec: KLSpec, host: Any, adaptive: bool = False) -> None:
        """Take over from veRL's controller.

        Args:
            spec: a score spec.
            host: veRL's own controller object.
            adaptive: whether that one changes its value, which then belongs into checkpoints.
        """
        self.spec, self.host, self.adaptive = spec, host, adaptive
        self.state = init(spec.beta, float(host.value))
        self.observed: tuple[float, float] | None = None
        self.pending = False  # an @advantage penalty is on its way

    @property
    def value(self) -> float:
        """Beta to use now."""
        return float(self.host.value if self.spec.beta is None else self.state["beta"])

    def update(self, current_kl: float, n_steps: int) -> None:
        """veRL calls this once per rollout batch; the spec's schedule uses the token-weighted k3 instead of its KL."""
        if self.spec.beta is None:
            self.host.update(current_kl=current_kl, n_steps=n_steps)
        elif self.observed is not None:
            kl, tokens = self.observed
            self.state = update(self.state, kl / max(tokens, 1.0), n_steps)

    def saved(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {**self.state, **({"host_value": float(self.host.value)} if self.adaptive else {})}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state."""
        self.state = restored(self.state, saved, self.spec.beta)
        if self.adaptive and saved is not None and "host_value" in saved:
            self.host.value = saved["host_value"]


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a controller's state; whole or not at all."""
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
            f"kl-plugins: {path} is damaged ({error}); delete it to start the beta controller anew"
        ) from None
    return state
