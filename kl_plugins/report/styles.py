"""How a run is drawn: colours that colour-blind readers can tell apart, and line styles and markers for print.

The colours are those of Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is hardly visible on
white. Colour, dash and marker change together, so each of them alone tells up to six runs apart.
"""

from __future__ import annotations

from typing import NamedTuple

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = {
    "solid": "",
    "dash": "9 5",
    "dot": "2 4",
    "dashdot": "9 4 2 4",
    "longdash": "15 5",
    "longdashdot": "15 4 2 4",
}
"""Dashes by their name in plotly, in the form of SVG's ``stroke-dasharray``."""

MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x")
MARKS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "cross": "✚", "x": "✖"}
"""Markers by their name in plotly, and a character that looks like each."""


class Style(NamedTuple):
    """Colour, dash and marker of one run."""

    colour: str
    dash: str
    marker: str


def style(index: int) -> Style:
    """Return the style of the run with this index; the first 42 differ."""
    dashes = tuple(DASHES)
    return Style(COLOURS[index % len(COLOURS)], dashes[index % len(dashes)], MARKERS[index % len(MARKERS)])
