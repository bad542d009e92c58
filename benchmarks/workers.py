"""Worker processes that make independent runs in parallel, and report progress and errors to one display."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import Progress

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # models of this size are fastest with one thread, and the runs share the cores
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

_messages: Any = None


class WorkerError(RuntimeError):
    """A worker process failed; the message contains the error of the worker."""


@dataclass
class Job:
    """One piece of work, which calls `function(*arguments, tick)` in a worker."""

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    steps: int
    done: Callable[[dict[str, Any]], None] = field(default=lambda result: None)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(workers: int, log_folder: Path) -> Iterator[Pool]:
    """Start worker processes for a `with` block; they end when the block is left, also by an error.

    Args:
        workers: number of processes.
        log_folder: folder for the output of the processes, one file per process.
    """
    os.environ.update(ENVIRONMENT)
    log_folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    executor = ProcessPoolExecutor(workers, context, _prepare, (messages, str(log_folder)))
    try:
        yield Pool(executor, messages, log_folder)
        executor.shutdown()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise


class Pool:
    """Runs jobs and reports their progress."""

    def __init__(self, executor: ProcessPoolExecutor, messages: Any, log_folder: Path) -> None:
        self._executor, self._messages, self._log_folder = executor, messages, log_folder

    def run(self, jobs: Sequence[Job], progress: Callable[[str, int], None]) -> None:
        """Run all jobs; the first failure stops all of them.

        Args:
            jobs: the jobs. When a job has finished, this process calls its `done` with the result.
            progress: function that is called with the name of a job and the number of its finished steps.

        Raises:
            WorkerError: A job raised an error, or a worker process died.
        """
        futures: dict[Future[dict[str, Any]], Job] = {
            self._executor.submit(_work, job.name, job.function, job.arguments): job for job in jobs
        }
        while futures:
            try:
                name, steps = self._messages.get(timeout=0.5)
                progress(name, steps)
            except queue.Empty:
                pass
            for future in [f for f in futures if f.done()]:
                job = futures.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise WorkerError(f"a worker died during {job.name} or beside it\n{self._last_words()}") from error
                except Exception as error:
                    cause = error.__cause__  # the traceback inside the worker
                    raise WorkerError(f"{job.name}: {cause or error!r}") from error
                job.done(result)
                progress(job.name, job.steps)

    def run_in_groups(self, bars: Progress, jobs: Sequence[tuple[str, Job]]) -> None:
        """Run all jobs like :meth:`run`, with one progress bar for each group.

        Args:
            bars: display that gets the bars.
            jobs: the jobs, each with the name of its group.
        """
        group_of = {job.name: group for group, job in jobs}
        totals, steps = Counter[str](), dict.fromkeys(group_of, 0)
        for group, job in jobs:
            totals[group] += job.steps
        tasks = {group: bars.add_task(group, total=total) for group, total in totals.items()}

        def show(name: str, done: int) -> None:
            steps[name] = max(done, steps[name])
            group = group_of[name]
            bars.update(tasks[group], completed=sum(n for other, n in steps.items() if group_of[other] == group))

        self.run([job for _, job in jobs], show)

    def _last_words(self) -> str:
        logs = sorted(self._log_folder.glob("worker-*.log"), key=lambda f: f.stat().st_mtime)
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs[-2:])


def _prepare(messages: Any, log_folder: str) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; both get the terminal's Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(Path(log_folder) / f"worker-{os.getpid()}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for chatty in ("httpx", "httpcore", "datasets", "filelock", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if find_spec("trl") is not None:  # the environments of other hosts may lack it
        importlib.import_module("trl").GRPOTrainer  # noqa: B018  this import is slow, so all workers do it at the start


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(name: str, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    print(f"== {name}", file=sys.stderr)
    collector = _Receipts()
    logger = logging.getLogger("kl_plugins")
    logger.addHandler(collector)
    try:
        result = function(*arguments, lambda steps: _messages.put((name, steps)))
    finally:
        logger.removeHandler(collector)
    return {**result, "plugin_log": collector.lines}


class _Receipts(logging.Handler):
    """Keeps the log lines of kl-plugins, in particular its receipt."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
