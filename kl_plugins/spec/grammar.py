"""Names and numbers of the KL spec; its options are the table in :mod:`kl_plugins.spec.options`."""

from __future__ import annotations

import math
import re

MAX_LENGTH = 256
"""Length of the longest text that is read as a spec, in characters.

A longer text is rejected, because it is probably a pasted file or a template that was not filled in.
"""

PLACEMENTS = ("loss", "reward", "advantage")

DEFAULT_BOUND = 30.0

DEFAULT_TOP, DEFAULT_DRAWS = 16, 8
"""Numbers of tokens that are kept and drawn if ``top`` is written without a number."""


def numbers_per_token(top: int, draws: int | None = None) -> int:
    """Return how many numbers of the reference each token needs under ``top:`` and ``draws:``."""
    return 2 * top + 1 + (3 * draws + 1 if draws else 0)


NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
ESTIMATOR_NAME = re.compile(r"[a-z][a-z0-9.+_-]*")


def parse_number(text: str) -> float | None:
    """Return a decimal or ``1e-3`` number that is finite and >= 0, or None if the text is not one."""
    if not re.fullmatch(NUMBER, text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def parse_numbers(text: str) -> list[float] | None:
    """Return numbers that are joined by ``-`` (an exponent's minus sign is part of its number), or None."""
    if not re.fullmatch(rf"{NUMBER}(?:-{NUMBER})*", text):
        return None
    values = [float(part) for part in re.findall(NUMBER, text)]
    # The numbers are valid only if the greedy scan consumed the whole text, as the full match did.
    return values if all(math.isfinite(value) for value in values) else None


def format_number(value: float) -> str:
    """Return the shorter of decimal and ``5e-1`` notation; :func:`parse_number` reads it back as the same number."""
    plain = repr(float(value))
    if plain.endswith(".0"):
        plain = plain[:-2]
    candidates = [plain]
    for digits in range(18):
        short = f"{value:.{digits}e}"
        if float(short) == value:
            mantissa, _, exponent = short.partition("e")
            candidates.append(f"{mantissa}e{int(exponent)}")
            break
    if "e" in plain:
        mantissa, _, exponent = plain.partition("e")
        candidates[0] = f"{mantissa}e{int(exponent)}"
    return min(candidates, key=len)
