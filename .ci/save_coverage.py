"""Saves the measured coverage of this process every two seconds, so that a killed process loses almost nothing.

coverage.py saves its data when Python exits. Ray, however, ends its workers without running Python's exit functions.
``branch_coverage.py`` therefore lets every Python process of its test run execute this program when it starts. The
program is not imported as a module, because tests may change the import path of a process in any way.
"""

import functools
import os
import threading
import time
from typing import Any

import coverage

INTERVAL = 2.0
"""Seconds between two saves."""

MARK = "saved_regularly"
"""Name of an attribute of coverage.py's class. It tells that this process has executed the program."""

saving = threading.RLock()


def one_at_a_time(save: Any) -> Any:
    """Let only one thread save: coverage.py saves at exit, perhaps during a save of the thread below."""

    @functools.wraps(save)
    def locked(self: coverage.Coverage) -> None:
        with saving:
            save(self)

    return locked


def save_regularly() -> None:
    """Save until the process ends."""
    while True:
        time.sleep(INTERVAL)
        # A forked child measures with an object of its own, so the object is looked up each time.
        if current := coverage.Coverage.current():
            current.save()


def start() -> None:
    """Start to save in a thread that does not keep the process alive."""
    threading.Thread(target=save_regularly, name="save-coverage", daemon=True).start()


def start_in_child() -> None:
    """Start the thread in a forked child, which has none of the threads of its parent."""
    saving.release()
    start()


# Python reads a .pth file twice if two names lead to its folder.
if coverage.Coverage.current() and not hasattr(coverage.Coverage, MARK):
    setattr(coverage.Coverage, MARK, True)
    coverage.Coverage.save = one_at_a_time(coverage.Coverage.save)  # type: ignore[method-assign]
    start()
    # A child that is forked during a save would have an incomplete copy of the data and of its locks.
    os.register_at_fork(before=saving.acquire, after_in_parent=saving.release, after_in_child=start_in_child)
