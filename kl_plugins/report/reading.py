"""Readers of logs: JSON lines, veRL's file logger, the trainer state of TRL, and TensorBoard's event files.

All of them are file formats. Which names a framework uses is known to its adapter; see
:mod:`kl_plugins.report.native`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kl_plugins.report.native import HostLogs, host_logs
from kl_plugins.report.run import Run, make_run

STATE = "trainer_state.json"
EVENTS = "events.out.tfevents."
LINES = (".jsonl", ".ndjson")
STEP_KEYS = ("step", "global_step")
"""Keys that hold the step of a line."""

PLAIN = (STATE, "metrics.jsonl", "metrics.ndjson", "log.jsonl", "train.jsonl")
"""File names that say nothing about the run; its folder does."""

FORMATS = (
    "Readable are: a JSON-lines file (.jsonl) with one object per step, which has a key step and numbers; the file of "
    "veRL's logger file; trainer_state.json of TRL, or a folder with it or with checkpoint-*/trainer_state.json; a "
    "folder with TensorBoard's event files, or one of these files."
)

Points = dict[str, dict[int, float]]
"""Values by step, by name of the metric."""


class LogError(ValueError):
    """A log that cannot be read; the message says why and what can be."""


class Found(NamedTuple):
    """What a reader found in one log: its format, its points, and notes about what was left out."""

    kind: str
    points: Points
    notes: list[str]


def read_runs(arguments: Sequence[str], candidates: Iterable[HostLogs] | None = None) -> list[Run]:
    """Read one or more logs.

    Args:
        arguments: paths of files or folders, each alone or as ``NAME=PATH``.
        candidates: the frameworks that may have written them; by default those of all installed adapters.

    Returns:
        The runs, in the order of the arguments, with distinct names.

    Raises:
        LogError: a path does not exist, is no log, or its format needs a package that is not installed.
    """
    hosts = list(host_logs() if candidates is None else candidates)
    logs: list[tuple[str, Path]] = []
    for argument in arguments:
        label, path = _labelled(argument)
        found = list(_logs_below(path))
        logs += [(label if len(found) == 1 else "", each) for each in found]
    names = _names([path for _, path in logs])
    runs, taken = [], set()
    for (label, path), short in zip(logs, names, strict=True):
        name, number = label or short, 2
        while name in taken:
            name, number = f"{label or short} ({number})", number + 1
        taken.add(name)
        kind, points, notes = _read(path)
        if not any(points.values()):
            raise LogError(f"kl-plugins report: {path} holds no number with a step. {FORMATS}")
        runs.append(make_run(name, path, kind, points, notes, hosts))
    return runs


def _labelled(argument: str) -> tuple[str, Path]:
    """Split ``NAME=PATH`` where the path exists; folders of sweeps have such signs in their own names."""
    if not Path(argument).exists():
        for place, character in enumerate(argument):
            path = argument[place + 1 :]
            if character == "=" and place and path and Path(path).exists():
                return argument[:place], Path(path)
    return "", Path(argument)


def _logs_below(path: Path) -> Iterator[Path]:
    """Give every log that a path stands for: a file, or a folder that is or holds one log or several."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise LogError(f"kl-plugins report: {path} does not exist. {FORMATS}")
    states = [path / STATE, *path.glob(f"checkpoint-*/{STATE}")]
    states = [state for state in states if state.is_file()]
    if states:
        # The state of the last checkpoint holds the history of the whole run.
        yield max(states, key=lambda state: (_global_step(state), state.parent == path))
        return
    if _has_events(path):
        yield path
        return
    lines = sorted(file for file in path.iterdir() if file.suffix in LINES)
    folders = sorted({file.parent for file in path.rglob(f"{EVENTS}*")})
    if not lines and not folders:
        raise LogError(f"kl-plugins report: the folder {path} holds no log. {FORMATS}")
    yield from lines or folders


def _global_step(state: Path) -> int:
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (ValueError, KeyError, TypeError, OSError):
        return -1


def _has_events(folder: Path) -> bool:
    return any(folder.glob(f"{EVENTS}*"))


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    parts = [_telling(path) for path in paths]
    for length in range(1, max((len(each) for each in parts), default=1) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _telling(path: Path) -> tuple[str, ...]:
    path = path.resolve()
    if path.name in PLAIN or path.name.startswith(EVENTS):
        path = path.parent
    if re.fullmatch(r"checkpoint-\d+", path.name):
        path = path.parent
    return (*path.parts[1:-1], path.stem if path.suffix in LINES else path.name)


def _read(path: Path) -> Found:
    if path.is_dir() or path.name.startswith(EVENTS):
        from kl_plugins.report.event_files import read_events

        return Found("TensorBoard event files", *read_events(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"kl-plugins report: {path} cannot be read ({error}). {FORMATS}") from error
    if path.suffix == ".json":
        return _state(path, text)
    return _lines(path, text)


def _state(path: Path, text: str) -> Found:
    try:
        history = json.loads(text)["log_history"]
        points: Points = {}
        for entry in history:
            _add(points, int(entry["step"]), entry)
    except (ValueError, KeyError, TypeError) as error:
        message = f"kl-plugins report: {path} is no trainer state with a log_history ({error!r}). {FORMATS}"
        raise LogError(message) from error
    return Found("trainer state (log_history)", points, [])


def _lines(path: Path, text: str) -> Found:
    points: Points = {}
    broken: list[int] = []
    nested = read = 0
    rows = text.splitlines()
    for index, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            entry = json.loads(row)
            step = next(entry[key] for key in STEP_KEYS if key in entry)
            data = entry.get("data")
            _add(points, int(step), data if isinstance(data, dict) else entry)
        except (ValueError, TypeError, AttributeError, StopIteration, OverflowError):
            broken.append(index)
            continue
        nested += isinstance(data, dict)
        read += 1
    if not read:
        raise LogError(f"kl-plugins report: {path} has no line that is a JSON object with a step. {FORMATS}")
    notes = []
    if broken == [len(rows)] and not text.endswith("\n"):
        notes.append("The last line is incomplete and was left out: the run is still writing, or was stopped.")
    elif broken:
        notes.append(
            f"{len(broken)} of {len(rows)} lines are no JSON object with a step and were left out, the first of "
            f"them line {broken[0]}."
        )
    return Found("veRL's file logger" if nested else "JSON lines", points, notes)


def _add(points: Points, step: int, entry: Mapping[str, Any]) -> None:
    """Add the numbers of one entry; a later entry of the same step replaces an earlier one, as after a resume.

    JSON has no NaN: some writers put null in its place, which is read as NaN.
    """
    for key, value in entry.items():
        if key in STEP_KEYS or isinstance(value, bool):
            continue
        if value is None:
            points.setdefault(key, {})[step] = math.nan
        elif isinstance(value, int | float):
            points.setdefault(key, {})[step] = float(value)
