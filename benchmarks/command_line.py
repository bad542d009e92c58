"""Functions that the command lines of the benchmarks share: lists of names, consoles, progress bars, interruption."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.workers import WorkerError

Value = TypeVar("Value")


def console_of(width: int) -> Console:
    """Make a console for tables; in a log it has the given width in characters, so that tables are not cut off."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress_of(console: Console, *, remaining: bool = False) -> Progress:
    """Make progress bars of counted steps, with the elapsed time and, if requested, the estimated remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *([TimeRemainingColumn()] if remaining else []), console=console)


def listed(text: str, read: Callable[[str], Value], *, optional: bool = False) -> list[Value]:
    """Return the values of a comma-separated option in their order, each of them once.

    Args:
        text: the text of the option.
        read: function that makes a value from each part, or raises ValueError.
        optional: whether the list may be empty.

    Raises:
        typer.BadParameter: `read` refuses a part, or there is no part.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts and not optional:
        raise typer.BadParameter("name at least one, separated by commas")
    try:
        return list(dict.fromkeys(map(read, parts)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def typed(module: str) -> str:
    """Return the command line for the report; paths in ``HOST=PATH`` are left out, because they name this machine."""
    words = [
        f"{name}=..." if given and Path(value).exists() else word
        for word in sys.argv[1:]
        for name, given, value in [word.partition("=")]
    ]
    return shlex.join(["python", "-m", module, *words])


@contextmanager
def interruptible(console: Console, *, resumable: bool = True) -> Iterator[None]:
    """Turn a failure of a worker and an interruption into a message and an exit status.

    A request to terminate ends the workers in the same way as Ctrl-C.

    Args:
        console: console for the message.
        resumable: whether the same command continues an interrupted run.

    Raises:
        typer.Exit: After the message was printed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except WorkerError as error:
        console.print("failed:", style="bold red", end=" ")
        console.print(str(error), highlight=False, markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        kept = "; finished runs are kept, the same command goes on from here" if resumable else ""
        console.print(f"interrupted{kept}")
        raise typer.Exit(130) from None
