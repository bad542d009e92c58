"""Start each host's worker in its own environment, one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from benchmarks.hosts.cases import HOSTS

ROOT = Path(__file__).parents[2]
LIMIT = 900.0
"""Seconds that one worker may take."""


def interpreters(given: list[str]) -> dict[str, str]:
    """Interpreters by host, from ``HOST=PATH`` options.

    Raises:
        typer.BadParameter: not ``host=path``, or no such host or file.
    """
    found = {}
    for text in given:
        host, _, path = text.partition("=")
        if host not in HOSTS:
            raise typer.BadParameter(f"{text!r}: expected HOST=PATH with HOST one of {', '.join(HOSTS)}")
        if not Path(path).exists():
            raise typer.BadParameter(f"{text!r}: there is no {path!r}")
        found[host] = path
    if not found:
        raise typer.BadParameter(
            "name at least one host's interpreter, for example --python trl=.nox/trl-1.16/bin/python"
        )
    return found


def command(module: str) -> str:
    """What was typed, without what is this machine's own."""
    words = [word.partition("=")[0] + "=..." if "=" in word else word for word in sys.argv[1:]]
    return " ".join(["python -m", module, *words])


class WorkerError(RuntimeError):
    """A worker ended badly; says where its output is and how it ends."""


def run_module(python: str, module: str, *arguments: str | Path, log: Path, limit: float = LIMIT) -> None:
    """Run ``python -m module arguments`` of another environment, its output into a file.

    Args:
        python: that environment's interpreter.
        module: of this repository.
        arguments: of the module.
        log: gets standard output and error.
        limit: seconds.

    Raises:
        WorkerError: it failed or took too long.
    """
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Programs of the environment, such as the ninja that DeepSpeed calls, come before others of the same name.
    path = os.pathsep.join([str(Path(python).absolute().parent), os.environ.get("PATH", "")])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables, "PATH": path}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "-W", "ignore", "-m", module, *map(str, arguments)],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
    if status != 0:
        ended = f"ran for more than {limit:.0f} s" if status is None else f"ended with status {status}"
        raise WorkerError(f"{module} {ended}; the end of {log}:\n{log.read_text()[-3000:]}")


def survived(failed: dict[str, str], host: str, module: str, *arguments: str | Path, **given: Any) -> bool:
    """:func:`run_module` for one of several hosts: its failure is noted, and the others go on.

    Args:
        failed: gets what went wrong, by host.
        host: whose worker it is.
        module, arguments, given: of :func:`run_module`.
    """
    try:
        run_module(given.pop("python"), module, *arguments, **given)
    except WorkerError as error:
        failed[host] = str(error)
        return False
    return True


def without(failed: dict[str, str]) -> str:
    """Who is missing from a result, as the end of a sentence."""
    return f"; failed: {', '.join(failed)}" if failed else ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a worker's session: Ray's own processes are in it."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    process.wait()
