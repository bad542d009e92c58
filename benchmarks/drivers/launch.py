"""Start the program of each host in the environment of the host, one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.hosts.cases import HOSTS, NAMES

ROOT = Path(__file__).parents[2]
LIMIT = 900.0
"""Time limit of one worker, in seconds."""


def interpreters(given: list[str]) -> dict[str, str]:
    """Return the interpreters by host, from ``HOST=PATH`` options.

    Raises:
        typer.BadParameter: if an option is not ``host=path``, or the host or file does not exist.
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


class WorkerError(RuntimeError):
    """A worker failed. The message says where its output is, and shows the end of the output."""


def run_module(python: str, module: str, *arguments: str | Path, log: Path, limit: float = LIMIT) -> None:
    """Run ``python -m module arguments`` in another environment, with its output in a file.

    Args:
        python: interpreter of that environment.
        module: module of this repository.
        arguments: arguments of the module.
        log: file for standard output and standard error.
        limit: time limit in seconds.

    Raises:
        WorkerError: if the module failed or took too long.
    """
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # The environment's programs, such as the ninja that DeepSpeed calls, must be found before others of the same name.
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


@dataclass
class Hosts:
    """The hosts that a benchmark runs, one after the other.

    Attributes:
        environments: interpreter of each host's environment.
        folder: folder for the files that the programs exchange; it is deleted at the end.
        logs: folder for the output of the programs.
        failed: errors by host.
    """

    environments: dict[str, str]
    folder: Path
    logs: Path
    progress: Progress
    task: TaskID
    failed: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        for host in self.environments:
            self.progress.update(self.task, description=NAMES[host])
            yield host
            self.progress.advance(self.task)

    def prepare(self, module: str, *arguments: str | Path, log: str) -> None:
        """Run the module that makes the models or rollouts of all hosts, in the first environment.

        Raises:
            WorkerError: if the module failed or took too long.
        """
        run_module(next(iter(self.environments.values())), module, *arguments, log=self.logs / log)

    def run(self, host: str, module: str, *arguments: str | Path, log: str = "", limit: float = LIMIT) -> bool:
        """Call :func:`run_module` in the environment of a host. A failure is stored, and the other hosts continue.

        Returns:
            Whether the module succeeded.
        """
        try:
            path = self.logs / (log or f"{host}.log")
            run_module(self.environments[host], module, *arguments, log=path, limit=limit)
        except WorkerError as error:
            self.failed[host] = str(error)
            return False
        return True

    def report(self, console: Console) -> None:
        """Print the errors of all hosts that failed."""
        for text in self.failed.values():
            console.print(text, highlight=False, markup=False)

    def without(self) -> str:
        """Return the end of a sentence that says which hosts are missing from a result."""
        return f"; failed: {', '.join(self.failed)}" if self.failed else ""


@contextmanager
def over_hosts(python: list[str], logs: Path) -> Iterator[Hosts]:
    """Show the progress over the hosts of ``HOST=PATH`` options, and give their programs a folder.

    Raises:
        typer.BadParameter: if an option is invalid; see :func:`interpreters`.
    """
    environments = interpreters(python)
    with tempfile.TemporaryDirectory(prefix="klp") as folder, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("before the hosts", total=len(environments))
        yield Hosts(environments, Path(folder), logs, progress, task)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill all remaining processes of a worker's session, which include Ray's own processes."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    process.wait()
