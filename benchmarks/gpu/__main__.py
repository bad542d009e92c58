"""The command line of the GPU stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command_line import listed
from benchmarks.gpu.stages import STAGE_MINUTES, STAGES, Step
from benchmarks.reporting import machine, write_json


def main(
    stage: Annotated[int, typer.Argument(help=f"One of {', '.join(map(str, STAGES))}.")],
    out: Annotated[Path, typer.Option(help="Folder for logs and results.")] = Path("out/bench/gpu"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    minutes: Annotated[
        float, typer.Option(help="Time limit of the stage; steps that do not fit are left out.")
    ] = STAGE_MINUTES,
    only: Annotated[str, typer.Option(help="Comma-separated names of steps; all by default.")] = "",
    smoke: Annotated[bool, typer.Option(help="Only test that everything runs, with tiny sizes.")] = False,
) -> None:
    """Run a stage step by step. Finished steps are kept and skipped; a step that fails does not stop the others."""
    if stage not in STAGES:
        raise typer.BadParameter(f"no stage {stage}; there is {', '.join(map(str, STAGES))}")
    end = time.monotonic() + 60 * minutes
    record_file = out / f"stage{stage}.json"
    record: dict[str, Any] = json.loads(record_file.read_text()) if record_file.exists() else {}
    record["machine"] = {**machine(), **card()}
    wanted = listed(only, str, optional=True)
    failed = False
    for step in STAGES[stage]:
        if wanted and step.name not in wanted:
            continue
        command = filled(step, out, device, smoke)
        if not step.goes_on and finished(record.get(step.name, {}), command):
            print(f"{step.name}: there already", flush=True)
            continue
        # The limit of a step is meant for a GPU; a smoke run may be on a slow machine.
        left = min(60 * (minutes if smoke else step.minutes), end - time.monotonic())
        if left < 5:
            print(f"{step.name}: left out, no time is left", flush=True)
            continue
        record[step.name] = run(step.name, command, out, left)
        failed |= record[step.name]["status"] != 0
        write_json(record_file, record)
        print(f"{step.name}: status {record[step.name]['status']}, {record[step.name]['seconds']:.0f} s", flush=True)
    raise typer.Exit(int(failed))


def filled(step: Step, out: Path, device: str, smoke: bool) -> list[str]:
    """Return the arguments of the interpreter for a step."""
    return [part.format(out=out, device=device) for part in (step.smoke if smoke else step.command)]


def finished(entry: dict[str, Any], command: list[str]) -> bool:
    """Return whether exactly this command has succeeded before; a smoke run does not replace a real one."""
    return entry.get("status") == 0 and entry.get("command") == shown(command)


def shown(command: list[str]) -> str:
    """Return a command in the form in which the record names it."""
    return " ".join(["python", *command])


def run(name: str, command: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Run one step; its output is written into ``out``, and printed when the step has ended.

    Args:
        name: name of the step.
        command: arguments of the interpreter.
        out: folder of the log.
        seconds: time limit, after which the step is stopped with status 124.

    Returns:
        The command, its exit status, and its time in seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    sys.stdout.write((out / f"{name}.log").read_text(errors="replace"))
    return {"command": shown(command), "status": status, "seconds": time.monotonic() - start}


def card() -> dict[str, str]:
    """Return name, driver and memory of the GPU as its driver reports them; empty if there is no GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(("card", "driver", "memory"), (part.strip() for part in answer.split(",")), strict=False))


if __name__ == "__main__":
    typer.run(main)
