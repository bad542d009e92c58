"""What every benchmark writes beside its numbers: the machine, the versions, JSON files that can be found again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores and library versions, as far as they bear on a number."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kl_plugins": version("kl-plugins"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data``, making the folder; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    partial.replace(path)


def finished(file: Path, key: str, field: str = "key") -> dict[str, Any] | None:
    """The record of a finished run, if it was made under this very key; None for a missing, torn or other record.

    Args:
        file: of the record.
        key: names the run by everything that it depends on.
        field: of the record, which holds its key.
    """
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get(field) == key else None
