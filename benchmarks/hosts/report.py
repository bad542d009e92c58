"""Tables and plots of the comparison of hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.hosts.cases import NAMES
from benchmarks.hosts.compare import EQUAL

COLOURS = {"trl": "tab:orange", "verl": "tab:blue", "openrlhf": "tab:green"}
MARKERS = {"trl": "o", "verl": "s", "openrlhf": "^"}


def worst(row: dict[str, Any]) -> float:
    """Return the largest of a row's relative differences to the core."""
    return max(float(row[key]) for key in ("coefficient", "loss", "gradient") if row[key] is not None)


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of parity, portable beta and native settings."""
    yield parity_table(found["parity"], list(found["versions"]))
    beta = Table("host", "aggregation", "beta x", "documented", "single sequences", title="beta for the same pull")
    for row in found["portable_beta"]:
        low, high = sorted(row["by_sequence"])
        factors = "all equal" if high - low < EQUAL else f"{low:.3f} - {high:.3f}"
        numbers = (f"{row['scale']:.4f}", f"{row['documented']:.4f}", factors)
        beta.add_row(NAMES[row["host"]], row["aggregation"], *numbers)
    yield beta
    titles = ("host", "its own setting", "is (or is nearest to)", "off by", "dead tokens", "logged / applied")
    native = Table(*titles, title="what the hosts' own KL settings do")
    for row in found["native"]:
        off = "equal" if row["equal"] else f"{row['distance']:.2g}"
        nearest = row["nearest"] if row["equal"] else f"({row['nearest']})"
        dead = f"{row['dead_tokens']} of {row['tokens']}" if row["dead_tokens"] else ""
        logged = f"{row['logged'] / row['applied']:.3f}" if row["applied"] and row["logged"] is not None else ""
        native.add_row(NAMES[row["host"]], row["setting"], nearest, off, dead, logged)
    yield native


def parity_table(rows: list[dict[str, Any]], hosts: list[str]) -> Table:
    """Make a table with one line per spec: each host compared with the core, and the two hosts that differ most."""
    table = Table("spec", *(NAMES[host] for host in hosts), "between hosts", title="relative difference to the core")
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["host"]: row for row in rows if row["case"] == case}
        pairs = [value for row in of_case.values() for value in row["hosts"].values()]
        cells = [f"{worst(of_case[host]):.1e}" if host in of_case else "" for host in hosts]
        table.add_row(case, *cells, f"{max(pairs):.1e}" if pairs else "")
    return table


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot relative differences per spec, factors of beta, and the distances of hosts' own settings from any spec."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in found["parity"]))[::-1]
    settings = list(dict.fromkeys((row["host"], _setting(row)) for row in found["native"]))[::-1]
    betas = len(found["portable_beta"])
    height = 2 + 0.22 * max(len(cases) + betas + 4, len(settings))
    figure = plt.figure(figsize=(15, height), layout="constrained")
    panels: list[Any] = [["parity", "native"], ["beta", "native"]]
    grid = figure.subplot_mosaic(panels, height_ratios=[len(cases) + 3, betas + 3])
    _parity_panel(grid["parity"], found, cases)
    _beta_panel(grid["beta"], found["portable_beta"])
    _native_panel(grid["native"], found["native"], settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parity_panel(axes: Any, found: dict[str, Any], cases: list[str]) -> None:
    between: dict[str, float] = {}
    for host in found["versions"]:
        rows = [row for row in found["parity"] if row["host"] == host]
        places = [cases.index(row["case"]) for row in rows]
        label = f"{NAMES[host]} {found['versions'][host]}, to the core"
        axes.plot([worst(row) for row in rows], places, MARKERS[host], color=COLOURS[host], label=label)
        for row in rows:
            between[row["case"]] = max(between.get(row["case"], 0.0), *row["hosts"].values(), 0.0)
    far = [case for case in cases if between[case] > EQUAL]
    if far:
        places = [cases.index(case) for case in far]
        axes.plot([between[case] for case in far], places, "x", color="black", label="between two hosts")
    axes.axvline(EQUAL, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlim=(1e-7, 10), xlabel="relative difference", title="the same spec in every host")
    axes.set(yticks=range(len(cases)), ylim=(-0.7, len(cases) - 0.3))
    axes.set_yticklabels(cases, fontsize=7)
    axes.legend(fontsize=7)


def _native_panel(axes: Any, rows: list[dict[str, Any]], settings: list[tuple[str, str]]) -> None:
    for row in rows:
        place, size = settings.index((row["host"], _setting(row))), max(row["distance"], 1e-7)
        near = row["scenario"] == "near"
        filled = COLOURS[row["host"]] if near else "white"
        axes.plot(size, place, MARKERS[row["host"]], color=COLOURS[row["host"]], markerfacecolor=filled)
        dead = f"{row['dead_tokens']} of {row['tokens']} tokens without gradient" if row["dead_tokens"] else ""
        text = row["nearest"] if near and row["equal"] else dead
        axes.text(size * 2.5, place, text, fontsize=6, va="center")
    axes.axvline(EQUAL, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlim=(1e-7, 1e4), yticks=range(len(settings)), ylim=(-0.7, len(settings) - 0.3))
    axes.set(title="the hosts' own KL settings (hollow: reference far away)")
    axes.set_xlabel("relative distance of the gradient from the nearest spec")
    axes.set_yticklabels([f"{NAMES[host]}: {setting}" for host, setting in settings], fontsize=7)


def _setting(row: dict[str, Any]) -> str:
    name: str = row["setting"].removesuffix(f" ({row['scenario']})")
    return name


def _beta_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    rows = rows[::-1]
    for index, row in enumerate(rows):
        low, high = sorted(row["by_sequence"])
        axes.plot([low, high], [index, index], color=COLOURS[row["host"]], alpha=0.4, linewidth=4)
        axes.plot(row["scale"], index, MARKERS[row["host"]], color=COLOURS[row["host"]])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(yticks=range(len(rows)), xscale="log", xlabel="factor on beta (line: of single sequences)")
    axes.set(title="beta that pulls as a mean over tokens does", xticks=[0.1, 0.2, 0.5, 1, 2])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticklabels([f"{NAMES[row['host']]}: {row['aggregation']}" for row in rows], fontsize=7)
