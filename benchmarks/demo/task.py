"""The task of the demonstration: write a number as an expression of three digits, with a rarely used operator.

A line reads "1 2 = 2 * 5 + 2". The reference has learned to write correct lines, and 98 % of them have only sums and
differences. A completion is rewarded if its value is right *and* it has a product, so the reference must change one
rare decision to get the reward. In this case the force of k3 as a loss is weaker than that of k2, because it
saturates where the policy writes what the reference rarely writes. If the rewarded behaviour is common, the order is
the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

NUMBERS = tuple(range(5, 13))  # numbers of the prompts, each with 65 to 129 rewarded expressions
DIGITS = tuple("0123456789")
OPERATORS = tuple("+-*")
COMPLETION_TOKENS = 6  # digit, operator, digit, operator, digit, end of sequence
LEARNED, RARE = 0.4, 0.02  # share of lines with a product in the first and in the last phase of training the reference
VOCABULARY = ("<pad>", "<eos>", *"0123456789", *OPERATORS, "=")


def prompt(number: int) -> str:
    """Return the prompt for a number: its two decimal digits and an equals sign, one token each."""
    return f"{number // 10} {number % 10} ="


def value(expression: str) -> int | None:
    """Return the value of a sequence of digits and operators separated by blanks, or None if it is malformed.

    Args:
        expression: such as "2 * 5 + 2"; `*` binds before `+` and `-`.

    Returns:
        The integer value; None for any text that does not have the form digit (operator digit)*.
    """
    parts = expression.split()
    if len(parts) % 2 == 0 or any(p not in DIGITS for p in parts[::2]) or any(p not in OPERATORS for p in parts[1::2]):
        return None
    total, term = 0, int(parts[0])
    for operator, digit in zip(parts[1::2], parts[2::2], strict=True):
        if operator == "*":
            term *= int(digit)
        else:
            total, term = total + term, int(digit) if operator == "+" else -int(digit)
    return total + term


@lru_cache(maxsize=1 << 20)
def verify(asked: str, completion: str) -> float:
    """Return 1.0 if the completion has the value of the prompt and contains a product, otherwise 0.0."""
    return float("*" in completion and value(completion) == int(asked.replace(" ", "").rstrip("=")))


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the reward of each completion, 0 or 1, by verifying it; this is TRL's reward function."""
    return [verify(asked, completion) for asked, completion in zip(prompts, completions, strict=True)]


@lru_cache(maxsize=1)
def expressions() -> tuple[str, ...]:
    """Return all well-formed expressions of one, two and three digits; longer ones do not fit into a completion."""
    found: list[str] = []
    for operators in range(3):
        for words in product(DIGITS, *([OPERATORS, DIGITS] * operators)):
            found.append(" ".join(words))
    return tuple(found)


def lines(number: int) -> tuple[list[str], list[str]]:
    """Return all correct expressions of three digits for a number: those without a product, and those with one."""
    right = [e for e in expressions() if len(e.split()) == 5 and value(e) == number]
    return [e for e in right if "*" not in e], [e for e in right if "*" in e]


def ids(text: str) -> list[int]:
    """Return the token ids of a text whose words are in the vocabulary."""
    return [VOCABULARY.index(word) for word in text.split()]
