"""Draws one plot twice: as a static picture for readers without scripts, and as an interactive figure of plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from kl_plugins.report.charts import Chart, Line
from kl_plugins.report.findings import Finding
from kl_plugins.report.series import Series, thinned
from kl_plugins.report.styles import DASHES, MARKS, Style, style

WIDTH, HEIGHT = 620, 340
"""Size of a plot in pixels: on A4 paper its width is that of the text."""

MOST_POINTS, MOST_STATIC = 2000, 300
"""Most points of a line, interactive and static."""

CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "scrollZoom": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
FONT = "system-ui, sans-serif"


def label(line: Line, chart: Chart) -> str:
    """Return the text of a line in a legend: the run, and the metric if the plot has several of that run."""
    return f"{line.name} · {line.key}" if sum(each.run == line.run for each in chart.lines) > 1 else line.name


def look_of(line: Line, chart: Chart) -> Style:
    """Return how a line is drawn: in the colour of its run, with another dash and marker for each further metric."""
    nth = [each.key for each in chart.lines if each.run == line.run].index(line.key)
    return style(line.run)._replace(dash=style(line.run + nth).dash, marker=style(line.run + nth).marker)


def interactive(chart: Chart, findings: Iterable[Finding]) -> str:
    """Return the figure as HTML: an element and the script that draws it.

    Args:
        chart: the plot.
        findings: findings about its metrics; their limits and first steps are drawn as thin lines.
    """
    import plotly.graph_objects as go
    import plotly.io

    figure = go.Figure()
    for line in chart.lines:
        look, shown = look_of(line, chart), thinned(line.series, MOST_POINTS)
        figure.add_trace(
            go.Scatter(
                x=list(shown.steps),
                y=[float(f"{value:.6g}") if math.isfinite(value) else None for value in shown.values],
                name=html.escape(label(line, chart)),
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker={"symbol": look.marker, "size": 7, "maxdisplayed": 12},
                hovertemplate="step %{x}: %{y:.4g}",
            )
        )
    figure.update_layout(
        template="none",
        font={"family": FONT, "size": 13, "color": "#222"},
        height=HEIGHT,
        margin={"l": 64, "r": 12, "t": 34, "b": 76 if len(chart.lines) > 1 else 44},
        hovermode="x unified",
        showlegend=len(chart.lines) > 1,
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0},
        xaxis={"title": {"text": "step", "standoff": 6}, "gridcolor": "#e5e5e5", "zeroline": False},
        yaxis={"title": {"text": chart.unit}, "gridcolor": "#e5e5e5", "zeroline": False, "exponentformat": "e"},
    )
    for finding in findings:
        if finding.limit is not None:
            figure.add_hline(y=finding.limit, line={"color": "#555", "dash": "dot", "width": 1})
        if finding.since is not None:
            figure.add_vline(x=finding.since, line={"color": "#555", "dash": "dot", "width": 1})
    if _positive(chart):
        buttons = [
            {"label": f"{kind} scale", "method": "relayout", "args": [{"yaxis.type": kind}]}
            for kind in ("linear", "log")
        ]
        menu = {"buttons": buttons, "type": "buttons", "direction": "right", "showactive": True}
        place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 0}}
        figure.update_layout(updatemenus=[{**menu, **place, "font": {"size": 10}}])
    text: str = plotly.io.to_html(
        figure, config=CONFIG, include_plotlyjs=False, full_html=False, div_id=f"{chart.anchor}-figure"
    )
    return text


def static(chart: Chart) -> str:
    """Return the plot as an SVG picture with axes from the smallest to the largest value."""
    lines = [(line, thinned(line.series.finite(), MOST_STATIC)) for line in chart.lines]
    steps = [step for _, series in lines for step in series.steps]
    values = [value for _, series in lines for value in series.values]
    parts = [
        f'<svg class="static" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(spoken(chart))}">',
        f'<rect x="64" y="12" width="{WIDTH - 76}" height="{HEIGHT - 56}" fill="none" stroke="#bbb"/>',
    ]
    if values:
        low, high, first, last = min(values), max(values), min(steps), max(steps)
        for line, series in lines:
            points = [
                (_place(step, first, last, 64, WIDTH - 12), _place(value, low, high, HEIGHT - 44, 12))
                for step, value in zip(series.steps, series.values, strict=True)
            ]
            parts += _drawn(points, look_of(line, chart))
        parts += [
            f'<text x="58" y="22" text-anchor="end">{high:.3g}</text>',
            f'<text x="58" y="{HEIGHT - 44}" text-anchor="end">{low:.3g}</text>',
            f'<text x="64" y="{HEIGHT - 26}">step {first}</text>',
            f'<text x="{WIDTH - 12}" y="{HEIGHT - 26}" text-anchor="end">step {last}</text>',
        ]
    return "".join([*parts, "</svg>"])


def spoken(chart: Chart) -> str:
    """Return what a screen reader says of the plot: what it shows, and the first and last value of each line."""
    ends = [f"{label(line, chart)} {_ends(line.series)}" for line in chart.lines]
    return f"{chart.title} against the step. {'; '.join(ends)}."


def _ends(series: Series) -> str:
    kept = series.finite()
    if not kept.steps:
        return "has no finite value"
    return f"from {kept.values[0]:.3g} at step {kept.steps[0]} to {kept.values[-1]:.3g} at step {kept.steps[-1]}"


def _positive(chart: Chart) -> bool:
    values = [value for line in chart.lines for value in line.series.finite().values]
    return bool(values) and min(values) >= 0 and max(values) > 0


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 1)


def _drawn(points: Sequence[tuple[float, float]], look: Style) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = f' stroke-dasharray="{DASHES[look.dash]}"' if DASHES[look.dash] else ""
    drawn = [f'<polyline points="{path}" fill="none" stroke="{look.colour}" stroke-width="2"{dash}/>']
    for x, y in points[:: max(len(points) // 12, 1)]:
        mark = MARKS[look.marker]
        drawn.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle" fill="{look.colour}">{mark}</text>')
    return drawn
