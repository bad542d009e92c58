"""The course of a run: measurements between steps, whichever framework makes the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .arms import Settings

Tick = Callable[[int], None]


class Curve:
    """Measures a policy between steps and keeps the averages of what its trainer logs.

    Args:
        settings: of the run.
        measure: what is measured.
        tick: called with the number of steps done.
        logged: keys of the trainer's log, averaged since the measurement before; None where it did not log them.

    Attributes:
        points: one dict per measurement, with `step`.
        seconds: what the measurements took.
    """

    def __init__(
        self, settings: Settings, measure: Callable[[], dict[str, Any]], tick: Tick, logged: tuple[str, ...]
    ) -> None:
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._settings, self._measure, self._tick = settings, measure, tick
        self._logged: dict[str, list[float]] = {key: [] for key in logged}

    def log(self, logs: Mapping[str, Any]) -> None:
        """Take what the trainer logs."""
        for key, values in self._logged.items():
            if key in logs:
                values.append(float(logs[key]))

    def step(self, step: int) -> None:
        """A step is done."""
        self._tick(step)
        if step % self._settings.evaluate_every == 0 or step == self._settings.steps:
            self.measure(step)

    def measure(self, step: int) -> None:
        """Measure now; once before the first step."""
        start = time.perf_counter()
        means = {key: sum(values) / len(values) if values else None for key, values in self._logged.items()}
        self._logged = {key: [] for key in self._logged}
        self.points.append({"step": step, **self._measure(), **means})
        self.seconds += time.perf_counter() - start
