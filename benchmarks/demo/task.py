"""The task: write a number as an expression of three digits. The reward asks for what the reference rarely does.

A line reads "1 2 = 2 * 5 + 2". The reference has learned to write correct lines, 98 % of them with sums and differences
alone. A completion is rewarded when its value is right *and* it multiplies: one rare decision, an operator, separates
the reference from the reward. In this regime the force of k3 as a loss is the weaker one (it saturates where the policy
writes what the reference rarely does), that of k2 is not; where the reward is common, the order turns round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

NUMBERS = tuple(range(5, 13))  # what the prompts ask for, each with 65 to 129 rewarded expressions
DIGITS = tuple("0123456789")
OPERATORS = tuple("+-*")
COMPLETION_TOKENS = 6  # digit, operator, digit, operator, digit, end of sequence
LEARNED, RARE = 0.4, 0.02  # share of lines with a product while the reference learns, and in what it writes at the end
VOCABULARY = ("<pad>", "<eos>", *"0123456789", *OPERATORS, "=")


def prompt(number: int) -> str:
    """The prompt for a number: its two decimal digits and an equals sign, one token each."""
    return f"{number // 10} {number % 10} ="


def value(expression: str) -> int | None:
    """The value of a sequence of digits and operators separated by blanks, or None where it is malformed.

    Args:
        expression: such as "2 * 5 + 2"; `*` binds before `+` and `-`.

    Returns:
        The integer value; None for anything that is not digit (operator digit)*.
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
    """1.0 where the completion has the value that the prompt asks for and contains a product, else 0.0."""
    return float("*" in completion and value(completion) == int(asked.replace(" ", "").rstrip("=")))


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """TRL's reward function: one verified 0 or 1 per completion."""
    return [verify(asked, completion) for asked, completion in zip(prompts, completions, strict=True)]


@lru_cache(maxsize=1)
def expressions() -> tuple[str, ...]:
    """All well-formed expressions of one, two and three digits, the longest a completion can hold."""
    found: list[str] = []
    for operators in range(3):
        for words in product(DIGITS, *([OPERATORS, DIGITS] * operators)):
            found.append(" ".join(words))
    return tuple(found)


def lines(number: int) -> tuple[list[str], list[str]]:
    """All correct three-digit expressions for a number: those without, and those with a product."""
    right = [e for e in expressions() if len(e.split()) == 5 and value(e) == number]
    return [e for e in right if "*" not in e], [e for e in right if "*" in e]


def ids(text: str) -> list[int]:
    """Token ids of a text whose words are in the vocabulary."""
    return [VOCABULARY.index(word) for word in text.split()]
