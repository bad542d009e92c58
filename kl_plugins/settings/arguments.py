"""Settings in the words of a command line: flags (``--key value``) and Hydra's overrides (``key=value``)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kl_plugins.settings.values import Settings, scalar

_OVERRIDE = re.compile(r"(\+\+|\+|~)?([A-Za-z_][\w.\-/@]*)=(.*)", re.DOTALL)

Word = tuple[str, str]
"""A word, and the place where it was found."""


def read_arguments(words: Sequence[Word]) -> Settings:
    """Read the words of a command line.

    All words after a flag, up to the next flag or override, are its value: none of them means True, several of them are
    a list. ``~key`` of Hydra, which deletes a key, sets nothing.

    Args:
        words: the words and their places.
    """
    found = Settings()
    rest = list(words)
    while rest:
        word, place = rest.pop(0)
        override = _OVERRIDE.fullmatch(word)
        if is_flag(word):
            key, equals, value = word[2:].partition("=")
            values = [value] if equals else []
            while not equals and rest and not is_flag(rest[0][0]) and not _OVERRIDE.fullmatch(rest[0][0]):
                values.append(rest.pop(0)[0])
            given = [scalar(text) for text in values]
            found.add(key, True if not given else given[0] if len(given) == 1 else given, place)
        elif override and override[1] != "~":
            found.add(override[2], scalar(override[3]), place)
        elif not override:
            found.words.append(word)
    return found


def is_flag(word: str) -> bool:
    """Whether a word is a flag with two dashes."""
    return word.startswith("--") and len(word) > 2
