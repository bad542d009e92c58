"""Measurements of a policy between the steps of a run, for any framework that makes the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .arms import Settings

Tick = Callable[[int], None]


class Curve:
    """Measures a policy between steps and keeps the averages of what its trainer logs.

    Args:
        settings: settings of the run.
        measure: function that measures the policy.
        tick: function that is called with the number of finished steps.
        logged: keys of the trainer's log. Each measurement has their averages since the previous one, or None for a key
            that was not logged.

    Attributes:
        points: one dict per measurement, with `step`.
        seconds: total time of the measurements.
    """

    def __init__(
        self, settings: Settings, measure: Callable[[], dict[str, Any]], tick: Tick, logged: tuple[str, ...]
    ) -> None:
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._settings, self._measure, self._tick = settings, measure, tick
        self._logged: dict[str, list[float]] = {key: [] for key in logged}

    def log(self, logs: Mapping[str, Any]) -> None:
        """Add an entry of the trainer's log."""
        for key, values in self._logged.items():
            if key in logs:
                values.append(float(logs[key]))

    def step(self, step: int) -> None:
        """Record that a step has finished, and measure if it is time."""
        self._tick(step)
        if step % self._settings.evaluate_every == 0 or step == self._settings.steps:
            self.measure(step)

    def measure(self, step: int) -> None:
        """Measure the policy; the first call is before the first step."""
        start = time.perf_counter()
        means = {key: sum(values) / len(values) if values else None for key, values in self._logged.items()}
        self._logged = {key: [] for key in self._logged}
        self.points.append({"step": step, **self._measure(), **means})
        self.seconds += time.perf_counter() - start
