"""Beta over the run: the spec's controller in the workers (``@loss``) or where rewards are shaped; checkpointed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_plugins.controllers import BetaSchedule, init, observed_kl_sums, update
from kl_plugins.spec import KLSpec

logger = logging.getLogger(__name__)


class LossBeta:
    """Beta of one worker; every rank holds the same state, because all see the same reduced KL."""

    def __init__(self, schedule: BetaSchedule | None, base: float) -> None:
        """Start at the schedule's beginning.

        Args:
            schedule: the spec's ``beta`` option.
            base: veRL's ``kl_loss_coef``.
        """
        self.schedule = schedule
        self.state = init(schedule, base)
        self._sums: Tensor | None = None

    @property
    def value(self) -> float:
        """Beta to use now."""
        return float(self.state["beta"])

    def observe(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> None:
        """Add one training micro-batch, (B, T) each, to the observed KL of the optimizer step."""
        if self.schedule is None:
            return
        kl, tokens = observed_kl_sums(logp, ref_logp, mask)
        # Sequences that padding or rejection emptied are none.
        sums = torch.stack([kl, tokens, mask.any(-1).sum().to(kl)]).float()
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self, dp_group: Any) -> None:
        """Advance after an optimizer step; a collective over the data-parallel ranks."""
        if self.schedule is None or self._sums is None:
            return
        sums, self._sums = self._sums, None
        if dp_group is not None:
            torch.distributed.all_reduce(sums, group=dp_group)
        kl, tokens, sequences = sums.tolist()
        self.state = update(self.state, kl / max(tokens, 1.0), int(sequences))


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


def restored(fresh: dict[str, Any], saved: dict[str, Any] | None, schedule: BetaSchedule | None) -> dict[str, Any]:
    """The saved state where it belongs to this schedule; else the fresh one, with a warning."""
    if schedule is None:
        return fresh
    if saved is None or any(saved.get(key) != fresh[key] for key in ("kind", "numbers")):
        logger.warning(
            "kl-plugins: the checkpoint holds no state of the beta controller %s; it starts anew at beta %g",
            schedule.kind, fresh["beta"],
        )  # fmt: skip
        return fresh
    return {key: saved[key] for key in fresh}


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
