"""Reader of TensorBoard's event files, by the package tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REMEDY = 'pip install "kl-plugins[report]" (or pip install tensorboard)'


def read_events(path: Path) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Read all scalars of a folder of event files, or of one file.

    Args:
        path: the folder or file.

    Returns:
        Values by step, by tag; and notes about what was left out, of which there are none.

    Raises:
        LogError: the package tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError as error:
        from kl_plugins.report.reading import LogError

        raise LogError(
            f"kl-plugins report: reading TensorBoard's event files ({path}) needs the package tensorboard, which "
            f"cannot be imported here ({error}). Install it: {REMEDY}"
        ) from error
    # 0 stands for "keep all"; by default a sample of 10,000 steps is kept.
    accumulator: Any = event_accumulator.EventAccumulator(str(path), size_guidance={event_accumulator.SCALARS: 0})
    accumulator.Reload()
    tags = accumulator.Tags()[event_accumulator.SCALARS]
    return {tag: {event.step: float(event.value) for event in accumulator.Scalars(tag)} for tag in tags}, []
