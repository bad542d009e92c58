"""Draws docs/choose.svg, the figure on the page "Which spec should I use?".

The command ``python -m tests.packaging.choose_figure`` updates the file. SVG is text, so a diff shows every change.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "choose.svg"

WIDTH, MARGIN, GAP = 880, 20, 34
QUESTION_WIDTH, ANSWER_LEFT = 350, 436
LINE, PADDING = 19, 12
INK, QUIET, QUESTION_FILL, ANSWER_FILL, EDGE = "#1f2430", "#5b6472", "#eef2f7", "#e6f4ea", "#8a94a3"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Step:
    """One question of the figure, with its answers.

    Attributes:
        question: lines of text; the first line is bold.
        word: the word on the arrow to the answers; it may be empty.
        answers: pairs of a spec and a remark about it.
    """

    question: tuple[str, ...]
    word: str
    answers: tuple[tuple[str, str], ...]


STEPS = (
    Step(
        ("1. Do you reproduce published results?", "Then use the spec of these results."),
        "yes",
        (("k3@loss", "GRPO"), ("k1@reward", "PPO, RLOO, REINFORCE++"), ("k1@advantage", "FRPO")),
    ),
    Step(
        ("2. Is a KL in the loss impossible?", "TRL's RLOO, for example, has none there."),
        "yes",
        (("k1@advantage", "after normalisation, so beta keeps its meaning"),),
    ),
    Step(
        (
            "3. Fresh, or a few updates old?",
            "Age of the data when they are trained on,",
            "counted in updates of the policy.",
        ),
        "yes",
        (
            ("default", "fresh: the floor rarely acts; older: watch kl/floor_frac"),
            ("exact@loss", "no sampling noise; runs the reference once more"),
        ),
    ),
    Step(
        ("4. Asynchronous: can the KL be exact?", "It needs logits of the reference."),
        "",
        (
            ("exact@loss", "yes: no token noise, and no weight"),
            ("k2@loss/is:token/behaviour:sampler/floor:0.5", "no: the weight divides by the engine's own log-probs"),
        ),
    ),
)


def draw(steps: tuple[Step, ...] = STEPS) -> str:
    """Return the figure as SVG.

    Args:
        steps: the questions from top to bottom; the arrow from one to the next has the word "no".
    """
    parts, top = [], float(MARGIN)
    for number, step in enumerate(steps):
        height = max(2 * PADDING + LINE * len(step.question), _answers_height(step))
        parts += _question(step, top, height)
        parts += _answers(step, top, height)
        if number + 1 < len(steps):
            x, bottom = MARGIN + 60, top + height
            parts.append(_arrow(x, bottom, x, bottom + GAP - 2))
            parts.append(_text(x + 10, bottom + GAP / 2 + 4, "no", QUIET))
        top += height + GAP
    total = top - GAP + MARGIN
    alt = "Four questions lead to a spec; the table on this page says the same."
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {total:g}' {FONT} font-size='14' role='img'>",
        f"<title>{alt}</title>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{EDGE}'/></marker></defs>",
        f"<rect width='{WIDTH}' height='{total:g}' rx='10' fill='#ffffff'/>",
    )
    return "\n".join((*head, *parts, "</svg>", ""))


def _answers_height(step: Step) -> float:
    return len(step.answers) * (2 * LINE + PADDING + 6) - 6


def _question(step: Step, top: float, height: float) -> list[str]:
    first = top + (height - LINE * len(step.question)) / 2 + 14
    lines = [
        _text(MARGIN + 16, first + LINE * row, line, INK if row == 0 else QUIET, bold=row == 0)
        for row, line in enumerate(step.question)
    ]
    return [_box(MARGIN, top, QUESTION_WIDTH, height, QUESTION_FILL), *lines]


def _answers(step: Step, top: float, height: float) -> list[str]:
    parts, each = [], 2 * LINE + PADDING
    y = top + (height - _answers_height(step)) / 2
    for number, (spec, note) in enumerate(step.answers):
        middle = y + each / 2
        parts.append(_arrow(MARGIN + QUESTION_WIDTH, middle, ANSWER_LEFT - 2, middle))
        if number == 0 and step.word:
            parts.append(_text(MARGIN + QUESTION_WIDTH + 22, middle - 6, step.word, QUIET))
        parts.append(_box(ANSWER_LEFT, y, WIDTH - MARGIN - ANSWER_LEFT, each, ANSWER_FILL))
        parts.append(_text(ANSWER_LEFT + 14, y + 20, spec, INK, bold=True, mono=True))
        parts.append(_text(ANSWER_LEFT + 14, y + 20 + LINE, note, QUIET))
        y += each + 6
    return parts


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='8' fill='{fill}' stroke='{EDGE}'/>"


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    ends = f"x1='{x:g}' y1='{y:g}' x2='{to_x:g}' y2='{to_y:g}'"
    return f"<line {ends} stroke='{EDGE}' stroke-width='1.5' marker-end='url(#tip)'/>"


def _text(x: float, y: float, text: str, fill: str, *, bold: bool = False, mono: bool = False) -> str:
    style = " font-weight='600'" if bold else ""
    style += " font-family='ui-monospace, SFMono-Regular, Menlo, Consolas, monospace'" if mono else ""
    return f"<text x='{x:g}' y='{y:g}' fill='{fill}'{style}>{escape(text)}</text>"


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
