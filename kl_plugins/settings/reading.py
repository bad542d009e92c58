"""Finds the format of what a user gives, reads it, and puts the settings of several sources together."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kl_plugins.settings.arguments import is_flag, read_arguments
from kl_plugins.settings.python import notebook_source, read_python
from kl_plugins.settings.shell import commands
from kl_plugins.settings.values import Settings
from kl_plugins.settings.yaml_files import read_yaml

YAML, PYTHON, NOTEBOOK, SHELL = (".yaml", ".yml", ".json"), (".py",), (".ipynb",), (".sh", ".bash", ".slurm", ".sbatch")
"""Suffixes of files, by format."""

_TEXT = re.compile(r"""[\w.]+\(|(?!--)(?![+~]*[\w.\-/@]+=['"\[{]).*\s""", re.DOTALL)
"""A word that is a whole text: a call, or words with blanks between them and not one quoted value."""

NO_YAML = "reading YAML needs PyYAML, which every framework brings and kl-plugins alone does not: pip install pyyaml"


class UnreadableError(ValueError):
    """A source of settings cannot be read; the message says which one and why."""


@dataclass(frozen=True)
class Format:
    """What a reader must know of a host's programs.

    Attributes:
        program: regular expression that finds a command of the host in the text of the command. Other commands of a
            script are left out, unless no command matches.
        calls: Python functions whose keyword arguments are settings; empty: all of them.
        config_flags: flags that name a YAML file with settings; settings of the command line go before its settings.
    """

    program: str = ""
    calls: tuple[str, ...] = ()
    config_flags: tuple[str, ...] = ()


def read_words(words: Sequence[str], form: Format) -> Settings:
    """Read the settings of a run from files, texts and arguments, in the order in which they are given.

    Args:
        words: each is the path of a file, ``-`` for standard input, an argument or override, or a text with several of
            them: a command line, a Python call. A later word replaces the settings of earlier ones.
        form: what is known of the host's programs.

    Raises:
        UnreadableError: a file cannot be read, or its content has no known format.
    """
    found = Settings()
    arguments: list[tuple[str, str]] = []
    before = ""
    for word in words:
        is_value = is_flag(before) and "=" not in before
        before = word
        if word == "-":
            found.update(read_text(sys.stdin.read(), "standard input", form))
        elif not is_value and _is_file(word):
            found.update(_read_file(Path(word), form))
        elif not is_value and _TEXT.match(word):
            found.update(read_text(word, "command line", form))
        else:
            arguments.append((word, "command line"))
    found.update(_with_configs(read_arguments(arguments), form, Path()))
    found.resolve()
    return found


def read_text(text: str, place: str, form: Format | None = None, suffix: str = "") -> Settings:
    """Read the settings in a text.

    Args:
        text: YAML, JSON, a shell script or command line, a notebook, or Python.
        place: the name of the source, for messages.
        form: what is known of the host's programs.
        suffix: the suffix of the file; without a known one the format is guessed.

    Raises:
        UnreadableError: the text is not what the suffix says.
    """
    form = form or Format()
    try:
        if suffix in NOTEBOOK:
            return read_python(notebook_source(text), place, form.calls)
        if suffix in PYTHON:
            return read_python(text, place, form.calls)
        if suffix in YAML:
            return read_yaml(text, place)
    except ModuleNotFoundError as error:
        raise UnreadableError(f"cannot read {place}: {NO_YAML}") from error
    except (ValueError, SyntaxError) as error:
        raise UnreadableError(f"cannot read {place}: {error}") from error
    if suffix in SHELL or text.startswith("#!"):
        return _read_shell(text, place, form)
    return _guessed(text, place, form)


def _guessed(text: str, place: str, form: Format) -> Settings:
    if re.search(r"^\s*[\w.]+\s*\(|^\s*(import|from)\s", text, re.MULTILINE):
        try:
            return read_python(text, place, form.calls)
        except SyntaxError:
            pass
    if re.search(r"""^\s*[\w.'"{-]+['"]?\s*:(\s|$)|^\s*[{]|^\s*-\s""", text, re.MULTILINE):
        try:
            return read_yaml(text, place)
        except ModuleNotFoundError as error:
            raise UnreadableError(f"cannot read {place}: {NO_YAML}") from error
        except ValueError:
            pass
    return _read_shell(text, place, form)


def _read_shell(text: str, place: str, form: Format) -> Settings:
    every, assignments = commands(text, place)
    texts = [" ".join(word for word, _ in command) for command in every]
    inside = [
        word
        for command in every
        for word, _ in command
        if form.program and any(space in word for space in " \n") and re.search(form.program, word)
    ]
    chosen = [every[i] for i, words in enumerate(texts) if form.program and re.search(form.program, words)]
    if inside:  # a whole command line in quotes, for example as an argument of bash -c
        return _read_shell(inside[-1], place, form)
    found = Settings()
    if len(chosen) > 1:
        found.notes.append(f"{place} has {len(chosen)} training commands; the last one is explained")
    words = chosen[-1] if chosen else [word for command in every for word in command]
    dropped = next((command[0] for command in every if chosen and is_flag(command[0][0])), None)
    if dropped is not None:
        found.notes.append(
            f"{dropped[1]}: a comment between two continued lines ends the command, so the shell does not pass on the "
            f"arguments from {dropped[0]} on"
        )
    folder = Path(place).parent if Path(place).is_file() else Path()
    found.update(_with_configs(read_arguments(words or assignments), form, folder))
    return found


def _with_configs(found: Settings, form: Format, folder: Path) -> Settings:
    """Put the settings of the YAML files that flags name below those of the command line itself."""
    whole = Settings()
    for flag in form.config_flags:
        named = found.get(flag)
        if named is None or not isinstance(named.value, str):
            continue
        path = next((path for path in (Path(named.value), folder / named.value) if path.is_file()), None)
        if path is None:
            whole.notes.append(f"--{flag} names {named.value}, which was not found, so its settings are unknown")
        else:
            whole.update(_read_file(path, form))
    whole.update(found)
    return whole


def _is_file(word: str) -> bool:
    suffixes = (*YAML, *PYTHON, *NOTEBOOK, *SHELL)
    named = word.lower().endswith(suffixes) and "=" not in word and " " not in word and not is_flag(word)
    try:
        return named or Path(word).is_file()
    except OSError:  # a long text is no path
        return False


def _read_file(path: Path, form: Format) -> Settings:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"cannot read {path}: {error}") from error
    return read_text(text, str(path), form, path.suffix.lower())
