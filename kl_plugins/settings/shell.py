"""Commands in a shell script: words with their lines, after the expansion of the script's own variables.

Quoting is left to :mod:`shlex`. Of the shell's language this module knows assignments, arrays, continuation lines,
comments and ``${NAME:-default}``. It takes every branch of an ``if``. Variables that are set elsewhere stay as they are
written, and a setting with such a value is unknown.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from kl_plugins.settings.arguments import Word

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_ARRAY = re.compile(
    r"\s*(?:export\s+|local\s+|declare\s+(?:-\w+\s+)*|readonly\s+)?([A-Za-z_]\w*)(\+?)=\((.*)", re.DOTALL
)
_EXPANSION = re.compile(r"\$\{([A-Za-z_]\w*|\d)(?:\[[@*]\])?(?:(:?[-=])([^${}]*))?\}|\$([A-Za-z_]\w*)")
_SUBSTITUTION = re.compile(r"\$\(+[^()]*\)+")
_ARITHMETIC = re.compile(r"\$\(\(([\w\s+*/-]+)\)\)")
_QUOTED_ARRAY = re.compile(r'"\$\{([A-Za-z_]\w*)\[@\]\}"')
_DECLARATIONS = ("export", "local", "declare", "readonly")
_PASSED_ON = re.compile(r"\$[@*\d]|\$\{[@*\d][^}]*\}")
_SEPARATOR = re.compile(r"[;&|]+")


def commands(text: str, place: str) -> tuple[list[list[Word]], list[Word]]:
    """Return the commands of a script, and its assignments.

    Args:
        text: the script.
        place: the name of the file.

    Returns:
        The words of each command, and the assignments as words ``NAME=value``.
    """
    variables: dict[str, str] = {}
    found: list[list[Word]] = []
    assignments: list[Word] = []
    for start, lines in _logical_lines(text):
        joined = " ".join(lines)
        array = _ARRAY.match("\n".join(lines))
        if array:
            inside = _words(_expanded(array[3].rpartition(")")[0], variables))
            before = variables.get(array[1], "") + " " if array[2] else ""
            variables[array[1]] = before + " ".join(shlex.quote(word) for word in inside)
            continue
        words = _words(_expanded(joined, variables))
        if words and words[0] in _DECLARATIONS:
            words = [word for word in words[1:] if not word.startswith("-")]
        matches = [_ASSIGNMENT.fullmatch(word) for word in words]
        if words and all(matches):
            for match in matches:
                assert match is not None
                variables[match[1]] = (variables.get(match[1], "") if match[2] else "") + match[3]
                assignments.append((f"{match[1]}={match[3]}", f"{place}:{start}"))
            continue
        places = _places(words, lines, start, place)
        command: list[Word] = []
        for word in places:
            if _PASSED_ON.fullmatch(word[0]):
                continue
            if _SEPARATOR.fullmatch(word[0]):
                found.append(command)
                command = []
            else:
                command.append(word)
        found.append(command)
    return [command for command in found if command], assignments


def _logical_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each command's first line number and its lines, joined over continuations, quotes and arrays."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        start, taken = index + 1, [lines[index]]
        index += 1
        while index < len(lines) and not taken[0].lstrip().startswith("#") and _goes_on(taken):
            taken.append(lines[index])
            index += 1
        if taken[0].strip() and not taken[0].lstrip().startswith("#"):
            array = _ARRAY.match(taken[0])
            yield start, taken if array else [line.removesuffix("\\") for line in taken]


def _goes_on(taken: list[str]) -> bool:
    last = taken[-1]
    if _ARRAY.match(taken[0]):
        inside = "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in taken)
        return inside.count("(") > inside.count(")")
    if last.endswith("\\"):
        return not (len(taken) > 1 and last.lstrip().startswith("#"))  # a comment ends a command, also with a backslash
    return len(taken) < 400 and _open_quote("\n".join(taken))


def _open_quote(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError as error:
        return "quotation" in str(error)
    return False


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quote that never closes: the rest of the script is one word, which is not an argument
        return text.split()


def _expanded(text: str, variables: dict[str, str]) -> str:
    """Replace the variables that are known, inner ones first; others stay."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[4]
        if name in variables:
            return variables[name]
        return match[3] if match[2] else match[0]

    def number(match: re.Match[str]) -> str:
        terms = re.split(r"\s*([+*/-])\s*", match[1].strip())
        numbers = [variables.get(term, term) for term in terms[::2]]
        if not all(term.isdecimal() for term in numbers):
            return match[0]
        words = [term for pair in zip(numbers, [*terms[1::2], ""], strict=True) for term in pair]
        return str(_calculated("".join(words)))

    text = _QUOTED_ARRAY.sub(lambda match: variables.get(match[1], match[0]), text)
    for _ in range(8):
        text, before = _ARITHMETIC.sub(number, _EXPANSION.sub(value, text)), text
        if text == before:
            break
    return _SUBSTITUTION.sub(lambda match: "".join(match[0].split()), text)  # one word, which stays unknown


def _calculated(text: str) -> int:
    """Return the value of a sum of products of whole numbers; products and quotients go first, from left to right."""
    total = 0
    for sign, product in re.findall(r"(^|[+-])([\d*/]+)", text):
        value = 1
        for operation, factor in re.findall(r"(^|[*/])(\d+)", product):
            value = value // int(factor) if operation == "/" and int(factor) else value * int(factor)
        total += -value if sign == "-" else value
    return total


def _places(words: list[str], lines: list[str], start: int, place: str) -> list[Word]:
    """Give each word the first line, from that of the word before it on, that contains its key."""
    found = []
    at = 0
    for word in words:
        key = word.partition("=")[0]
        at = next((number for number in range(at, len(lines)) if key in lines[number]), at)
        found.append((word, f"{place}:{start + at}"))
    return found
