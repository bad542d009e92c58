"""The schedules and controllers of beta that ``beta:`` can name, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kl_plugins.controllers import BetaSchedule
from kl_plugins.spec.errors import nearest_word
from kl_plugins.spec.grammar import format_number, parse_numbers
from kl_plugins.spec.option_row import BadValueError, Values


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule: its notation, what it does in general, and what it does with given numbers."""

    kind: str
    form: str
    meaning: str
    effect: str

    @property
    def arity(self) -> int:
        """Return how many numbers the schedule takes."""
        return self.form.count("<")


SCHEDULES: dict[str, ScheduleRow] = {
    row.kind: row
    for row in (
        ScheduleRow(
            "linear",
            "linear-<b0>-<b1>-<n>",
            "from b0 to b1 in n updates, on a line",
            "from {0} to {1} in {2} updates, on a line",
        ),
        ScheduleRow(
            "cosine",
            "cosine-<b0>-<b1>-<n>",
            "from b0 to b1 in n updates, on half a cosine",
            "from {0} to {1} in {2} updates, on half a cosine",
        ),
        ScheduleRow(
            "adaptive",
            "adaptive-<target>-<horizon>",
            "multiplied up or down towards an observed KL of target nats per token",
            "from the host's beta towards an observed KL of {0} nats per token, over {1} sequences",
        ),
        ScheduleRow(
            "dual",
            "dual-<target>-<lr>",
            "dual ascent: beta += lr (observed KL - target), never below 0",
            "from the host's beta, beta += {1} (observed KL - {0}), never below 0",
        ),
    )
}


def _read(text: str) -> BetaSchedule:
    kind, _, rest = text.partition("-")
    expected = "one of " + ", ".join(row.form for row in SCHEDULES.values())
    if kind not in SCHEDULES:
        raise BadValueError(f"unknown schedule {kind!r}", expected, nearest_word(kind, SCHEDULES))
    numbers, arity = parse_numbers(rest), SCHEDULES[kind].arity
    if numbers is None or len(numbers) != arity:
        raise BadValueError(f"{kind} takes {arity} numbers joined by '-'", expected)
    for problem in _faults(kind, numbers):
        raise BadValueError(problem, expected)
    return BetaSchedule(kind, tuple(numbers))


def _faults(kind: str, numbers: list[float]) -> Iterator[str]:
    if kind in ("linear", "cosine") and (numbers[2] < 1 or numbers[2] != int(numbers[2])):
        yield "n counts updates: a whole number >= 1"
    if kind == "adaptive" and min(numbers) == 0:
        yield "target and horizon must be > 0"
    if kind == "dual" and numbers[1] == 0:
        yield "the learning rate must be > 0"


def _write(schedule: BetaSchedule) -> str:
    return "-".join([schedule.kind, *map(format_number, schedule.numbers)])


def _effect(schedule: BetaSchedule) -> str:
    return SCHEDULES[schedule.kind].effect.format(*map(format_number, schedule.numbers))


SCHEDULE = Values(
    "<schedule>",
    _read,
    _write,
    _effect,
    forms=tuple(row.form for row in SCHEDULES.values()),
    examples=(
        ("linear-0.1-0-100", "linear-1e-1-0.0-100", BetaSchedule("linear", (0.1, 0.0, 100.0))),
        ("cosine-1e-5-0.2-1e4", "cosine-0.00001-.2-10000", BetaSchedule("cosine", (1e-5, 0.2, 1e4))),
        ("adaptive-6-1e4", "adaptive-6.0-10000", BetaSchedule("adaptive", (6.0, 1e4))),
        ("dual-0-0.01", "dual-0-1e-2", BetaSchedule("dual", (0.0, 0.01))),
    ),
)
"""The values of ``beta:``."""
