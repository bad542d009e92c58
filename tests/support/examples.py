"""The examples in docs/examples, as the tests of the hosts run them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def execute(
    script: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    *,
    seconds: float,
    end_session: Callable[[int], None],
) -> str:
    """Run a shell script of the examples until its end; everything that it started ends with it.

    Args:
        script: path below docs/examples.
        arguments: at the end of its command line.
        folder: to run in; the output is written there as well.
        environment: all environment variables of the process.
        seconds: that it may take.
        end_session: ends all processes of a session, by the number of its leader.

    Returns:
        What it printed, without colours.
    """
    output = folder / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            ["bash", str(EXAMPLES / script), *arguments], cwd=folder, env=environment,
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        finally:
            end_session(process.pid)
            process.wait()
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.read_text(errors="replace"))
    assert status == 0, text[-8000:]
    return text
