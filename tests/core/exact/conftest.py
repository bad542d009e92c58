"""What the accuracy tests measured, as lines at the end of pytest's output."""

from __future__ import annotations

import pytest

LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def accuracy_lines(request: pytest.FixtureRequest) -> list[str]:
    """Lines that are printed after the tests, whether they passed or failed."""
    return request.config.stash.setdefault(LINES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("accuracy of the exact KL: worst error over promise")
        for line in lines:
            terminalreporter.write_line(line)
