"""The tasks that policies learn. Each task includes the lines of its reference, which set how often it is rewarded.

`rare` and `common` are one task (write a number as an expression with a product) under two references: one multiplies
in 2 % of its lines, the other in half of them. `sums` is plain arithmetic, and the reference knows a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from benchmarks.demo import task as products
from benchmarks.demo.evaluate import Space

SUMS_KNOWN = 0.4  # share of right lines among those that the reference of `sums` learns
FREQUENT = 0.5  # share of products among the lines that the reference of `common` learns


@dataclass(frozen=True)
class Line:
    """A line to learn, and its probability in the two phases of pre-training."""

    prompt: str
    completion: str
    early: float
    late: float


@dataclass(frozen=True)
class Task:
    """Prompts, verified rewards, and the lines of the reference.

    Attributes:
        name: name on the command line.
        meaning: one line for tables.
        prompts: words separated by blanks, all of one length.
        completion_tokens: number of words of the longest completion, including its end.
        expected: lowest and highest reward that the reference may have.
        verify: (prompt, completion) -> 0 or 1.
        lines: lines that the reference learns.
    """

    name: str
    meaning: str
    prompts: tuple[str, ...]
    completion_tokens: int
    expected: tuple[float, float]
    verify: Callable[[str, str], float]
    lines: Callable[[], tuple[Line, ...]]

    def reward(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        """Act as TRL's reward function: return one verified 0 or 1 per completion."""
        return [self.verify(p, _spaced(c)) for p, c in zip(prompts, completions, strict=True)]

    def space(self) -> Space:
        """Return the task for exact enumeration."""
        return _space(self.name)

    def prompts_per_step(self, most: int) -> int:
        """Return the number of prompts of a step."""
        return min(most, len(self.prompts))

    def batches(self, most: int, seed: int) -> Iterator[list[str]]:
        """Yield the prompts of each step, without end.

        As in TRL, each prompt comes once per epoch, and the end of an epoch that does not fill a step is dropped.
        """
        count, generator = self.prompts_per_step(most), torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.prompts), generator=generator).tolist()
            for start in range(0, len(order) - count + 1, count):
                yield [self.prompts[i] for i in order[start : start + count]]


def _spaced(completion: str) -> str:
    """Return a completion as words, because other tokenizers leave no blanks between digits."""
    return " ".join(completion.replace(" ", ""))


@lru_cache(maxsize=8)
def _space(name: str) -> Space:
    task = TASKS[name]
    candidates = _sums_completions() if name == "sums" else products.expressions()
    rewarded = [f"{p} {c} <eos>" for p in task.prompts for c in candidates if task.verify(p, c)]
    return Space.of(task.prompts, rewarded, task.completion_tokens)


def _product_lines(early: float, late: float) -> tuple[Line, ...]:
    found = []
    for number in products.NUMBERS:
        without, with_product = products.lines(number)
        for expressions, shares in ((without, (1 - early, 1 - late)), (with_product, (early, late))):
            weights = [share / len(expressions) / len(products.NUMBERS) for share in shares]
            found += [Line(products.prompt(number), e, weights[0], weights[1]) for e in expressions]
    return tuple(found)


def _sums_completions() -> list[str]:
    return [f"{n // 10} {n % 10}" for n in range(19)]


def verify_sum(prompt: str, completion: str) -> float:
    """Return 1.0 if the completion is the sum of the prompt's two digits, written with two digits, else 0.0."""
    first, _, second, _ = prompt.split()
    total = int(first) + int(second)
    return float(completion == f"{total // 10} {total % 10}")


def _sum_lines() -> tuple[Line, ...]:
    found, prompts = [], TASKS["sums"].prompts
    for prompt in prompts:
        for completion in _sums_completions():
            wrong = (1 - SUMS_KNOWN) / (len(_sums_completions()) - 1)
            weight = (SUMS_KNOWN if verify_sum(prompt, completion) else wrong) / len(prompts)
            found.append(Line(prompt, completion, weight, weight))
    return tuple(found)


_NUMBERS = tuple(products.prompt(n) for n in products.NUMBERS)
TASKS = {
    task.name: task
    for task in (
        Task(
            "rare", "a correct expression with a product, which the reference writes in about 2 % of its lines",
            _NUMBERS, products.COMPLETION_TOKENS, (0.005, 0.05), products.verify,
            lambda: _product_lines(products.LEARNED, products.RARE),
        ),
        Task(
            "common", "the same, under a reference that writes one in about half of its lines",
            _NUMBERS, products.COMPLETION_TOKENS, (0.25, 0.6), products.verify,
            lambda: _product_lines(FREQUENT, FREQUENT),
        ),
        Task(
            "sums", "the sum of two digits, which the reference gets right in about 40 % of its lines",
            tuple(f"{a} + {b} =" for a in range(10) for b in range(10)), 3, (0.2, 0.55), verify_sum, _sum_lines,
        ),
    )
}  # fmt: skip
