"""Comparison of counted collectives with the model's prediction: rows, table, scaling, plot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.collectives.count import Seen, ours
from benchmarks.collectives.plan import MICRO_BATCHES, NATIVE, SPECS, Added, carried, paper
from benchmarks.hosts.cases import NAMES
from benchmarks.hosts.report import COLOURS, MARKERS
from kl_plugins import KLSpec
from kl_plugins.spec.observation import looks_like_observation

PER_NODE = 8
LATENCY = {"within a node": 5e-6, "between nodes": 2e-5}
BANDWIDTH = 1.25e10
"""Bytes per second (100 Gbit/s).

The model assumes this bandwidth, ``PER_NODE`` ranks per node, and ``LATENCY`` seconds per message.
"""

MODEL_RANKS = (1, 2, 4, 8, 64, 512, 4096)
GRADIENT_BYTES = 2 * 7e9
"""Bytes of the gradient of a 7-billion-parameter model in 16 bits: the host's own traffic per step, for comparison."""


def row(host: str, ranks: int, spec: str, arm: dict[str, Any], native: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one spec of one host with ``ranks`` processes: counted, predicted, and whether both agree."""
    steps = arm["steps"]
    seen, host_seen = ([Seen(*one) for one in part["seen"]] for part in (arm, native))
    added = ours(seen)
    own = [one for one in seen if one not in added]
    expected = paper(host, spec, arm["micro_batches"], arm["sequences"])
    # TRL has no driver: the numbers stay in the process that computed them. An observation has none.
    sent = 0 if host == "trl" or looks_like_observation(spec) else carried(KLSpec.parse(spec))
    by = Counter(f"{one.operation} of {one.bytes} B in {one.by}" for one in added)
    found = Added(
        tuple(one.bytes for one in added if "gather" in one.operation),
        tuple(one.bytes for one in added if "reduce" in one.operation),
    )
    return {
        "host": host,
        "ranks": ranks,
        "spec": spec,
        "calls": found.calls / steps,
        "bytes": found.bytes / steps,
        "paper_calls": expected.calls,
        "paper_bytes": expected.bytes,
        "host_calls": len(host_seen) / steps,
        # The bytes that the plugin's metrics add to the host's own collectives.
        "host_bytes": (sum(one.bytes for one in own) - sum(one.bytes for one in host_seen)) / steps,
        "carried": arm.get("carried", 0),
        "paper_carried": sent,
        "agrees": arm.get("carried", 0) == sent
        and (found.calls, found.bytes) == (expected.calls * steps, expected.bytes * steps)
        and found.calls == len(added)
        and Counter(one.operation for one in own) == Counter(one.operation for one in host_seen),
        "by": dict(by),
    }


def rows(host: str, ranks: int, arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all specs of one host."""
    native = arms[NATIVE[host]]
    return [row(host, ranks, spec, arms[spec], native) for spec in SPECS[host]]


def table(found: list[dict[str, Any]]) -> Table:
    """Make a table of counted and predicted collectives."""
    titles = (
        "host", "processes", "spec", "calls added", "on paper", "bytes added", "on paper", "host's own calls",
        "B/token to the driver",
    )  # fmt: skip
    made = Table(*titles, title="collectives that a spec adds to one optimizer step of one rank")
    for one in found:
        made.add_row(
            NAMES[one["host"]],
            str(one["ranks"]),
            one["spec"],
            f"{one['calls']:g}",
            f"{one['paper_calls']:g}",
            f"{one['bytes']:g}",
            f"{one['paper_bytes']:g}",
            f"{one['host_calls']:g}",
            f"{one['carried']:g}",
        )
    return made


def scaling(hosts: list[str], micro_batches: int = 8, sequences: int = 32) -> list[dict[str, Any]]:
    """Return the model's prediction by ranks. No term depends on tokens, vocabulary or parameters.

    Args:
        hosts: names of the hosts.
        micro_batches: number of micro-batches per rank and optimizer step.
        sequences: number of sequences per rank and step.
    """
    made = []
    for host in hosts:
        for spec in SPECS[host]:
            for ranks in MODEL_RANKS:
                added = paper(host, spec, micro_batches, sequences)
                traffic = added.traffic(ranks)
                # The slowest link determines the speed of a ring.
                latency = LATENCY["within a node" if ranks <= PER_NODE else "between nodes"]
                ring, tree = (latency * added.hops(ranks, way) + traffic / BANDWIDTH for way in (False, True))
                made.append(
                    {
                        "host": host,
                        "spec": spec,
                        "ranks": ranks,
                        "traffic": traffic,
                        "nodes": -(-ranks // PER_NODE),
                        "seconds_ring": ring,
                        "seconds_tree": tree,
                        "of_gradient": traffic / (2 * (ranks - 1) / ranks * GRADIENT_BYTES) if ranks > 1 else 0.0,
                    }
                )
    return made


FORMULAS = (
    "Per rank and optimizer step; M micro-batches, R ranks, N tokens, V vocabulary, D width, P parameters.",
    "TRL:      M all-gathers of 4 (1 + metrics) bytes; @reward: one of 4 (sequences of the rank)",
    "veRL:     @loss: one all-reduce of 48 bytes; its metrics ride on veRL's own gather of objects, under 2 kB; "
    "@reward, @advantage: none, the driver shapes them",
    "OpenRLHF: @loss: per rollout batch two all-reduces of 8 (means + 7) and 8 (maxima) bytes, per optimizer step one "
    "of 40 (with beta: 64); @reward and @advantage: none",
    "top:<k>:  veRL, OpenRLHF: 4 (2 k + 1) bytes per response token to the driver, and as many from it; with draws:<m> "
    "4 (2 k + 3 m + 2); top alone: 232",
    "beta:     a controller in the loss adds one all-reduce of 12 bytes",
    "R = 1:    the same calls, to itself, under torchrun; none without a process group",
    "ring:     an all-gather of b bytes sends (R-1) b in R-1 hops, an all-reduce 2 (R-1)/R b in 2 (R-1)",
    "tree:     log2 R hops and 2 log2 R",
    "compute:  sampled specs O(N); exact ones O(N V) for the sums, 2 N V D for the heads, 2 N P for the reference",
)


def scaling_table(found: list[dict[str, Any]]) -> Table:
    """Make a table of milliseconds per step by ranks, for collectives in trees and in flat rings."""
    title = f"on paper, ms per step along trees - along rings: 8 micro-batches, {PER_NODE} ranks per node, "
    title += ", ".join(f"{seconds * 1e6:g} us {where}" for where, seconds in LATENCY.items())
    shown = [ranks for ranks in MODEL_RANKS if ranks > 1]
    made = Table("host", "spec", *(f"{ranks} ranks" for ranks in shown), title=title)
    for host, spec in dict.fromkeys((one["host"], one["spec"]) for one in found):
        cells = [one for one in found if (one["host"], one["spec"], one["ranks"] > 1) == (host, spec, True)]
        numbers = (f"{one['seconds_tree'] * 1e3:.2g} - {one['seconds_ring'] * 1e3:.2g}" for one in cells)
        made.add_row(NAMES[host], spec, *("0" if text == "0 - 0" else text for text in numbers))
    return made


def plot(found: list[dict[str, Any]], model: list[dict[str, Any]], path: Path) -> None:
    """Plot counted and predicted bytes by processes, and the predicted traffic next to the traffic of a gradient."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    styles = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1)), (0, (8, 3)), (0, (8, 2, 2, 2)))
    for index, (host, spec) in enumerate(dict.fromkeys((one["host"], one["spec"]) for one in found)):
        counted = [one for one in found if (one["host"], one["spec"]) == (host, spec)]
        expected = [one for one in model if (one["host"], one["spec"]) == (host, spec) and one["ranks"] > 1]
        style = styles[SPECS[host].index(spec)]
        ranks = [one["ranks"] for one in counted]
        shift = 1 + 0.012 * index
        left.plot([r * shift for r in ranks], [one["bytes"] for one in counted], MARKERS[host], color=COLOURS[host])
        left.plot(ranks, [one["paper_bytes"] for one in counted], color=COLOURS[host], linestyle=style, linewidth=1)
        label = f"{NAMES[host]} {spec}"
        given = {"color": COLOURS[host], "linestyle": style, "label": label}
        if any(one["traffic"] for one in expected):
            right.plot([one["ranks"] for one in expected], [one["traffic"] for one in expected], **given)
    ranks = [ranks for ranks in MODEL_RANKS if ranks > 1]
    right.plot(
        ranks, [2 * (r - 1) / r * GRADIENT_BYTES for r in ranks], color="black", label="gradient of 7e9 parameters"
    )
    left.set(xscale="log", xlabel="processes", ylabel="bytes that a rank puts in per step")
    left.set_title("counted (markers) and on paper (lines)", fontsize=9)
    left.set_xticks([1, 2, 4], ["1", "2", "4"])
    left.minorticks_off()
    right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes that a rank sends per step")
    right.set_title(f"on paper, {8} micro-batches (counted ones: {MICRO_BATCHES})", fontsize=9)
    right.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
