"""Measures the time of a sampled term and of the host's own expression of the same KL, forward and backward, in turns.

Run as ``python -m benchmarks.host_terms`` in the environment of a host; it finds the host by its package and writes
``out/bench/host_terms/<host>.json``. If matplotlib is installed, it draws all hosts that were measured so far. The time
of kl-plugins includes the diagnostics (``KLTerm.metrics``), which the hosts' expressions do not have.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.reporting import machine, write_json
from kl_plugins import KLSpec, kl_term

SHAPES = ((8, 1024), (8, 8192), (64, 8192))
Expression = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pair(NamedTuple):
    """A host's own KL and the spec with the same gradient.

    Attributes:
        name: name of the host's KL.
        host: computes the KL of each token from log-probs of policy, reference and old policy.
        spec: the spec.
    """

    name: str
    host: Expression
    spec: str


def trl() -> Iterator[Pair]:
    """Yield the pairs of TRL, which has no function for its KL; the formula is therefore repeated here."""

    def k3(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
        return torch.exp(ref_logp - logp) - (ref_logp - logp) - 1

    def corrected(logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
        return k3(logp, ref_logp, old_logp) * torch.exp(logp - old_logp)

    yield Pair("k3", k3, "k3@loss")
    yield Pair("k3, bias correction", corrected, "k3+@loss/is:token/behaviour:old")


def verl() -> Iterator[Pair]:
    """Yield the pairs of veRL, with its function ``kl_penalty``."""
    from verl.trainer.ppo.core_algos import kl_penalty

    def of(name: str) -> Expression:
        return lambda logp, ref_logp, old_logp: kl_penalty(logp, ref_logp, name)

    for name, spec in (("low_var_kl", "k3@loss"), ("k2", "k2@loss"), ("k3+", "k3+@loss")):
        yield Pair(name, of(name), spec)


def openrlhf() -> Iterator[Pair]:
    """Yield the pairs of OpenRLHF, with its function ``compute_approx_kl``.

    Its package imports flash-attn, for which the tests have a stand-in on a CPU.
    """
    from tests.support.openrlhf.ray_support import CPU_HOST

    sys.path.append(str(CPU_HOST))
    from openrlhf.models.utils import compute_approx_kl

    def of(estimator: str, unbiased: bool) -> Expression:
        return lambda logp, ref_logp, old_logp: compute_approx_kl(logp, ref_logp, old_logp, estimator, unbiased)

    yield Pair("k3", of("k3", False), "k3@loss")
    yield Pair("k2", of("k2", False), "k2@loss")
    yield Pair("k2, unbiased_gradient", of("k2", True), "k2@loss/is:token/cap:10/behaviour:old")


HOSTS = {"trl": trl, "verl": verl, "openrlhf": openrlhf}


def ours(spec: KLSpec, mask: Tensor) -> Expression:
    """Return a function that computes the term of the spec."""
    return lambda logp, ref_logp, old_logp: kl_term(spec, logp, ref_logp, mask, old_logp=old_logp).loss


def milliseconds(expression: Expression, tensors: tuple[Tensor, Tensor, Tensor], repeats: int) -> float:
    """Return the milliseconds of one forward and backward pass, as a mean over ``repeats`` passes."""
    start = time.perf_counter()
    for _ in range(repeats):
        tensors[0].grad = None
        expression(*tensors).sum().backward()
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats


def measure(pair: Pair, shape: tuple[int, int], device: str, rounds: int) -> dict[str, Any]:
    """Time both expressions on the same tensors in turns."""
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = (-torch.rand(shape, generator=generator).to(device) for _ in range(3))
    tensors = (logp.requires_grad_(), ref_logp, old_logp)
    sides = {"host": pair.host, "ours": ours(KLSpec.parse(pair.spec), torch.ones_like(logp, dtype=torch.bool))}
    repeats = max(1, 200_000 // logp.numel())
    times: dict[str, list[float]] = {side: [] for side in sides}
    for expression in sides.values():
        milliseconds(expression, tensors, 2)
    for _ in range(rounds):
        for side, expression in sides.items():
            times[side].append(milliseconds(expression, tensors, repeats))
    ratios = [mine / theirs for mine, theirs in zip(times["ours"], times["host"], strict=True)]
    found = {name: statistics.quantiles(values, n=4) for name, values in {**times, "ratio": ratios}.items()}
    return {
        "host_kl": pair.name,
        "spec": pair.spec,
        "shape": shape,
        **{f"{name}_quartiles": values for name, values in found.items()},
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for JSON and plot.")] = Path("out/bench/host_terms"),
    rounds: Annotated[int, typer.Option(min=3, help="Measurements per expression and size.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the hosts that are installed here, print a table, write JSON, and draw all results so far."""
    present = [name for name in HOSTS if importlib.util.find_spec(name)]
    if not present:
        raise typer.BadParameter(f"none of {', '.join(HOSTS)} is installed here")
    for host in present:
        rows = [measure(pair, shape, device, rounds) for pair in HOSTS[host]() for shape in SHAPES]
        table = Table("KL", "spec", "tokens", "host ms", "ours ms", "ours/host", title=f"{host} {version(host)}")
        for row in rows:
            middle = {name: row[f"{name}_quartiles"][1] for name in ("host", "ours", "ratio")}
            numbers = (f"{middle['host']:.3f}", f"{middle['ours']:.3f}", f"{middle['ratio']:.2f}")
            table.add_row(row["host_kl"], row["spec"], str(row["shape"][0] * row["shape"][1]), *numbers)
        Console().print(table)
        write_json(out / f"{host}.json", {"machine": machine(), "host": host, "version": version(host), "rows": rows})
    if importlib.util.find_spec("matplotlib"):
        plot([json.loads(path.read_text()) for path in sorted(out.glob("*.json"))], out / "host_terms.png")


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of kl-plugins divided by the host's, with one panel per host."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained", squeeze=False)
    for axes, host in zip(panels[0], found, strict=True):
        for name in dict.fromkeys(row["host_kl"] for row in host["rows"]):
            rows = [row for row in host["rows"] if row["host_kl"] == name]
            tokens = [row["shape"][0] * row["shape"][1] for row in rows]
            lower, middle, upper = zip(*(row["ratio_quartiles"] for row in rows), strict=True)
            axes.plot(tokens, middle, marker="o", label=f"{name}: {rows[0]['spec']}")
            axes.fill_between(tokens, lower, upper, alpha=0.2)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens", ylabel="our time / host's", title=f"{host['host']} {host['version']}")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
