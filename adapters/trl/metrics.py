"""The ``kl/`` metrics in TRL's own log: those of everything since TRL last logged, as if it had been one batch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from kl_plugins.adapters.metrics import joined

_ALWAYS = "kl/active"


class Window:
    """What has been added up since TRL last logged, over micro-batches and ranks.

    TRL averages each list of its log when it logs, and empties the log afterwards. So each list holds one number, that
    of the whole window, and a log without it means that a new window has begun.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(
        self, log: MutableMapping[str, list[float]], sums: Mapping[str, float], maxima: Mapping[str, float]
    ) -> dict[str, float]:
        """Add a micro-batch and put the window's metrics into the host's log.

        Args:
            log: TRL's ``_metrics[mode]``.
            sums: totals over all ranks, see :func:`kl_plugins.adapters.metrics.sums_and_maxima`.
            maxima: the largest of all ranks.

        Returns:
            The metrics of the window before this one where a new one begins; else nothing.
        """
        ended: dict[str, float] = {}
        if not log.get(_ALWAYS) and self._sums:
            ended = joined(self._sums, self._maxima)
            self._sums, self._maxima = {}, {}
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        for key, value in maxima.items():
            self._maxima[key] = max(self._maxima.get(key, value), value)
        for key, value in joined(self._sums, self._maxima).items():
            log[key] = [value]
        return ended
