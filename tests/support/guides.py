"""The code that README and the quickstarts show, as their tests run it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of one language, without the indentation that a tab gives them.

    Args:
        page: path in the repository.
        language: as it is written behind the fence.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    return [dedent(found["code"]) for found in _BLOCK.finditer(text) if found["language"] == language]


def arguments(page: str, program: str) -> list[list[str]]:
    """What a page's commands give to a program, one list per block of shell that starts it.

    Dots, which stand for the rest of a command, are left out.

    Args:
        page: path in the repository.
        program: the word behind which the arguments begin.
    """
    commands = [shlex.split(block.replace("\\\n", " "), comments=True) for block in blocks(page, "sh")]
    return [
        [word for word in words[words.index(program) + 1 :] if word != "..."] for words in commands if program in words
    ]
