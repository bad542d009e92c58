"""Flat settings with dotted keys, and the place where each of them was found."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_INTERPOLATION = re.compile(r"\$\{\s*(?:oc\.select:)?\s*([\w.]+)\s*(?:,\s*([^{}]*))?\}")
"""An interpolation of OmegaConf: ``${a.b}`` or ``${oc.select:a.b,default}``."""


@dataclass(frozen=True)
class Unknown:
    """A value that reading cannot determine, for example a variable of the shell that is set elsewhere.

    Attributes:
        text: the value as it was written.
    """

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: its name, with dots between the levels, as the host writes it.
        value: a bool, int, float, str, list or None; :class:`Unknown` if reading cannot determine it.
        place: where it was found, for example ``grpo.yaml:3`` or ``command line``.
    """

    key: str
    value: Any
    place: str

    def __str__(self) -> str:
        return f"{self.key}={self.value} ({self.place})"


class Settings:
    """The settings of a run. A later value of a key replaces an earlier one.

    Attributes:
        words: words of a command line that are not settings, for example the name of a program.
        calls: names of the Python functions whose keyword arguments were read.
        imports: top-level modules that a Python source imports.
        notes: what the reader did not or could not use, in words.
    """

    def __init__(self) -> None:
        self._found: dict[str, Setting] = {}
        self.words: list[str] = []
        self.calls: list[str] = []
        self.imports: set[str] = set()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._found.values())

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def add(self, key: str, value: Any, place: str) -> None:
        """Add a setting. A mapping becomes one setting per entry, with dotted keys.

        Args:
            key: the dotted key.
            value: the value.
            place: where it was found.
        """
        if isinstance(value, Mapping):
            for name, entry in value.items():
                self.add(f"{key}.{name}" if key else str(name), entry, place)
        else:
            self._found.pop(key, None)  # the order is that of the last values
            self._found[key] = Setting(key, value, place)

    def get(self, key: str) -> Setting | None:
        """Return the setting with this key, or None."""
        return self._found.get(key)

    def update(self, other: Settings) -> None:
        """Add everything that ``other`` holds; its values replace those of the same keys."""
        for setting in other:
            self.add(setting.key, setting.value, setting.place)
        self.words += other.words
        self.calls += other.calls
        self.imports |= other.imports
        self.notes += other.notes

    def renamed(self, new_key: Mapping[str, str]) -> Settings:
        """Return the same settings with some keys replaced.

        Args:
            new_key: old key -> new key; other keys are kept.
        """
        found = Settings()
        found.update(self)
        found._found = {}
        for setting in self:
            found.add(new_key.get(setting.key, setting.key), setting.value, setting.place)
        return found

    def resolve(self) -> None:
        """Replace OmegaConf's interpolations (``${a.b}``) by the values of the settings that they name."""
        for key, setting in list(self._found.items()):
            self._found[key] = Setting(key, self._resolved(setting.value, 8), setting.place)

    def _resolved(self, value: Any, depth: int) -> Any:
        if not isinstance(value, Unknown) or depth == 0:
            return value
        match = _INTERPOLATION.fullmatch(value.text.strip())
        if match is None:
            return value
        found = self._found.get(match[1])
        if found is not None:
            return self._resolved(found.value, depth - 1)
        return value if match[2] is None else scalar(match[2])


def scalar(text: str) -> Any:
    """Return the value that a word of a command line or an unquoted YAML scalar stands for.

    Args:
        text: the word.

    Returns:
        A bool, None, an int, a float, a list or mapping for a literal of one, the text itself, or :class:`Unknown` if
        the text contains an expansion that was not resolved.
    """
    bare = text.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        return bare[1:-1]
    if "$" in bare:
        return Unknown(bare)
    if bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if bare.lower() in ("null", "~") or bare == "None":  # none is a word of its own, for example for scale_rewards
        return None
    for convert in (int, float):
        try:
            return convert(bare)
        except ValueError:
            continue
    if bare[:1] in ("[", "{"):
        return _literal(bare)
    return text


def _literal(text: str) -> Any:
    words = {"true": "True", "false": "False", "null": "None"}
    try:
        return ast.literal_eval(re.sub(r"\b(true|false|null)\b", lambda match: words[match[0]], text))
    except (ValueError, SyntaxError):
        if text.startswith("["):  # Hydra's lists need no quotes
            return [scalar(part) for part in text[1:-1].split(",") if part.strip()]
        return text
