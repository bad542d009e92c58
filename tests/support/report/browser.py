"""A headless browser for tests of pages: Chromium or Chrome, without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATH_VARIABLE = "KL_PLUGINS_BROWSER"
"""Path of the browser; without it, one of the names above is looked for."""

REQUIRED_VARIABLE = "KL_PLUGINS_REQUIRE_BROWSER"
"""If this is set, a missing browser is a failure and not a skipped test."""

OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # the sandbox does not work for root, as whom tests in containers run
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
    "--window-size=1300,2000",
)


@dataclass(frozen=True)
class Opened:
    """A page after its scripts have run: its elements as text, and what the browser's console said."""

    dom: str
    console: list[str]


def find_browser() -> str:
    """Return the path of a browser; skip the test if there is none, or fail it if one is required."""
    found = os.environ.get(PATH_VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return found
    message = f"no Chromium or Chrome was found; {PATH_VARIABLE} can name one"
    if os.environ.get(REQUIRED_VARIABLE):
        pytest.fail(f"{message}, and {REQUIRED_VARIABLE} is set")
    pytest.skip(message)


def start(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page and run one action of the browser, which the options name."""
    command: Sequence[str] = (find_browser(), *OPTIONS, f"--user-data-dir={profile}", *options, page.as_uri())
    return subprocess.run(command, text=True, capture_output=True, timeout=300, check=True)


def open_page(page: Path, profile: Path, *options: str) -> Opened:
    """Open a page, let its scripts run, and return what there is then."""
    result = start(page, profile, *options, "--dump-dom")
    return Opened(result.stdout, re.findall(r".*:CONSOLE.*", result.stderr))


def print_page(page: Path, profile: Path, target: Path) -> bytes:
    """Print a page to a PDF file and return the file's content."""
    start(page, profile, "--no-pdf-header-footer", f"--print-to-pdf={target}")
    return target.read_bytes()
