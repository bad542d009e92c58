"""veRL's training workers for the study: one Ray cluster and one worker per process."""

from __future__ import annotations

import atexit
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.drivers import verl
from tests.support.verl import remote

from .settings import Settings


@cache
def start() -> None:
    """Prepare this process for veRL, and start its Ray cluster, which ends with the process."""
    verl.prepare()
    import ray

    if ray.is_initialized():
        return
    running = verl.session()
    running.__enter__()
    atexit.register(running.__exit__, None, None, None)


class StudyWorkers(verl.Workers):
    """One worker with TRL's optimizer and learning rate, which processes a rollout as one micro-batch."""

    def __init__(self, reference_folder: Path, settings: Settings, sequences: int) -> None:
        self._settings, self._sequences, self._model = settings, sequences, reference_folder
        self._reference: Path | None = None
        super().__init__(str(reference_folder), micro_batch=sequences, packed=False)

    def engine(self, ranks: int) -> Any:
        return dataclasses.replace(super().engine(ranks), infer_micro_batch_size_per_gpu=self._sequences)

    def optimizer(self) -> Any:
        return dataclasses.replace(
            super().optimizer(),
            lr=self._settings.learning_rate,
            weight_decay=0.0,
            clip_grad=self._settings.max_grad_norm,
            total_training_steps=self._settings.steps,
        )

    def begin(self, reference_folder: Path, kl: str | None, needs_reference: bool, **actor: Any) -> None:
        """Start a run from the reference's weights.

        Args:
            reference_folder: folder in which the reference was saved.
            kl: the `@loss` spec; None for no KL loss.
            needs_reference: whether the worker must hold the reference model, for exact terms.
            actor: settings of veRL's actor.
        """
        if reference_folder != self._model:
            self.ask(remote.start_from, str(reference_folder))
            self._model = reference_folder
        if needs_reference and reference_folder != self._reference:
            self.ask(remote.add_reference, str(reference_folder))
            self._reference = reference_folder
        self.use(kl, **actor)
        self.ask(remote.decay_to_zero, self._settings.steps)

    def cpu_seconds(self) -> float:
        """Return the processor time of the worker so far, in seconds."""
        return float(self.ask(remote.cpu_seconds)[0])

    def load_into(self, policy: Any) -> None:
        """Load the worker's current weights into a local copy of the policy."""
        weights = self.ask(remote.weights)[0]
        mine = dict(policy.named_parameters())
        if mine.keys() != weights.keys():
            raise RuntimeError(f"veRL's worker trains other parameters: {sorted(mine.keys() ^ weights.keys())}")
        for name, parameter in mine.items():
            parameter.data.copy_(weights[name])


_held: dict[tuple[Settings, int], StudyWorkers] = {}


def workers_of(reference_folder: Path, settings: Settings, sequences: int) -> StudyWorkers:
    """Return this process's workers, and end workers with other settings.

    A new worker takes some seconds to start. A change of the model does not need a new worker.

    Args:
        reference_folder: folder in which a reference was saved.
        settings: settings of the study.
        sequences: number of sequences of an update.
    """
    start()
    key = (settings, sequences)
    if key not in _held:
        end()
        _held[key] = StudyWorkers(reference_folder, *key)
    return _held[key]


def end() -> None:
    """End this process's workers."""
    while _held:
        _held.popitem()[1].end()
