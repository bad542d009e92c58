"""Functions with which all benchmarks describe the machine and the versions, and write and find JSON files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return processor, cores, GPU and library versions, on which measured numbers depend."""
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
    """Write ``data`` as JSON and make the folder if necessary; readers never see an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    partial.replace(path)


def finished(file: Path, key: str, field: str = "key") -> dict[str, Any] | None:
    """Return the record of a finished run, or None if it is missing, unreadable, or has another key.

    Args:
        file: file of the record.
        key: key of the run, made from everything that it depends on.
        field: field of the record that has its key.
    """
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get(field) == key else None
