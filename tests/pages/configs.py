"""Parts of the page about configs: what the command prints, and tables of its rules."""

from __future__ import annotations

import contextlib
import io
import os
import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from kl_plugins.adapters.explained.common import COMMON
from kl_plugins.cli.explaining_config import explain_config_command
from tests.pages.parts import DOCS, table
from tests.support.configs import ROWS, found, hosts, rules

PICTURE = DOCS / "explain-config.svg"
"""The picture of the page."""

CONFIGS = DOCS / "data" / "configs"
"""Folder of the example configs."""

WIDTH = 100


def listing(host: str, file: str, *options: str) -> str:
    """Return a config and what ``kl-plugins explain`` prints about it, as two blocks of Markdown.

    Args:
        host: name of the host.
        file: name of a file in :data:`CONFIGS`.
        options: further options of the command.
    """
    path = CONFIGS / file
    language = {".yaml": "yaml", ".sh": "sh"}[path.suffix]
    shown = " ".join(["kl-plugins explain --host", host, file, *options])
    version = hosts()[host].tested[-1]
    printed = output([file, "--host", host, "--version", version, *options])
    return f"```{language}\n{path.read_text('utf-8').rstrip()}\n```\n\n```text\n$ {shown}\n{printed}\n```"


def output(arguments: list[str]) -> str:
    """Return what the command prints, in lines of :data:`WIDTH` columns.

    Args:
        arguments: the words after ``explain``; files are those of :data:`CONFIGS`.
    """
    text = io.StringIO()
    before = Path.cwd()
    environment = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    try:
        os.chdir(CONFIGS)
        with patch.dict(os.environ, environment), contextlib.redirect_stdout(text):
            explain_config_command(arguments)
    finally:
        os.chdir(before)
    return text.getvalue().rstrip()


def picture() -> str:
    """Return what the command prints about the TRL example, as it looks in a terminal, as SVG."""
    console = partial(
        Console, record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor"
    )
    made: list[Console] = []

    def recording(**options: Any) -> Console:
        made.append(console(**options))
        return made[-1]

    before = Path.cwd()
    try:
        os.chdir(CONFIGS)
        with patch("rich.console.Console", recording):
            version = hosts()["trl"].tested[-1]
            explain_config_command(["grpo.yaml", "--host", "trl", "--version", version])
    finally:
        os.chdir(before)
    title = "kl-plugins explain --host trl grpo.yaml"
    svg = made[-1].export_svg(title=title, unique_id="explain")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # the reader's own fonts: nothing is fetched
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def rules_part(host: str) -> str:
    """Return the table of the rules about a host, or about all hosts.

    Args:
        host: name of the host; empty for the rules about all hosts.
    """
    lines = []
    for rule in COMMON if not host else rules(host):
        row = next(row for row in ROWS if row.rule == rule.id)
        finding = found(row.host, row.hit, row.version)[rule.id]
        statement = finding.statement + (f". *Remedy:* {finding.remedy}." if finding.remedy else ".")
        name = f"`{rule.id}`<br>{rule.severity}" + (f"<br>versions {rule.versions}" if rule.versions else "")
        example = row.hit.replace("\n", " ; ").replace("actor_rollout_ref.", "")
        lines.append((name, f"`{example}`", statement, rule.source))
    return table(("rule", "for example in", "what it says there", "source"), lines)
