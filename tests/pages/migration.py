"""The hosts' own KL settings and the spec of the same gradient, as ``make bench-hosts`` measured them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tests.pages.parts import DOCS, table

FILE = DOCS / "data" / "hosts" / "native.json"

COMMANDS: dict[str, dict[str, str]] = {
    "trl": {
        "k3": "`beta=b`",
        "k3, use_bias_correction_kl": "`beta=b, use_bias_correction_kl=True`",
        "k3, use_bias_correction_kl, sequence level": (
            '`beta=b, use_bias_correction_kl=True, importance_sampling_level="sequence"`'
        ),
    },
    "verl": {
        **{f"{name}": f"`kl_loss_type={name}`" for name in ("kl", "abs", "mse", "low_var_kl")},
        **{f"{name}+": f"`kl_loss_type={name}+`" for name in ("kl", "abs", "low_var_kl")},
        **{f"{name} in reward": f"`kl_penalty={name}`" for name in ("kl", "abs", "mse", "low_var_kl")},
    },
    "openrlhf": {
        **{f"k{n}, use_loss": f"`--algo.kl.estimator k{n} --algo.kl.use_loss`" for n in (1, 2, 3)},
        **{
            f"k{n}, use_loss, unbiased_gradient": (
                f"`--algo.kl.estimator k{n} --algo.kl.use_loss --algo.kl.unbiased_gradient`"
            )
            for n in (1, 2, 3)
        },
        **{f"k{n} in reward": f"`--algo.kl.estimator k{n}`" for n in (1, 2, 3)},
    },
}
"""What a user writes for each setting that was measured, by host and by its name in ``benchmarks.hosts.cases``."""

SYNONYMS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
"""veRL's two names for one estimator."""


@cache
def measured() -> dict[str, Any]:
    """The measurement's file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def settings(host: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Measured rows of a host by setting and scenario (``near``, ``far``)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measured()["native"]:
        if row["host"] == host:
            found.setdefault(row["setting"].rpartition(" (")[0], {})[row["scenario"]] = row
    return found


def part(host: str) -> str:
    """The table of one host."""
    rows = []
    for setting, by_scenario in settings(host).items():
        near, far = by_scenario["near"], by_scenario["far"]
        spec = f"`{near['nearest']}`" if near["equal"] else f"none; nearest is `{near['nearest']}`"
        beta = "the same" if near["equal"] else "-"
        rows.append((_command(host, setting), spec, beta, _difference(near, far)))
    return table(("your setting", "spec of the same gradient", "beta", "where they differ"), rows)


def _command(host: str, setting: str) -> str:
    text = COMMANDS[host][setting]
    word = setting.removesuffix(" in reward").rstrip("+")
    if host == "verl" and word in SYNONYMS:
        text += f" (or `{SYNONYMS[word]}{'+' if '+' in setting else ''}`)"
    return text


def _difference(near: dict[str, Any], far: dict[str, Any]) -> str:
    if not near["equal"]:
        return f"{near['distance']:.2f} of the gradient near the reference"
    if far["equal"]:
        return "nowhere that was measured"
    dead = f"; {far['dead_tokens']} of {far['tokens']} tokens have no gradient left" if far["dead_tokens"] else ""
    return f"far from the reference, by {far['distance']:.2f} of the gradient{dead}: the framework's own clamps act"


def beta_part() -> str:
    """The factors between aggregations."""
    rows = []
    names = {"trl": "TRL, `loss_type`", "verl": "veRL, `loss_agg_mode`", "openrlhf": "OpenRLHF, KL loss"}
    for row in measured()["portable_beta"]:
        low, high = sorted(row["by_sequence"])
        single = "all the same" if high - low < 1e-5 else f"{low:.2f} to {high:.2f}"
        rows.append((names[row["host"]], f"`{row['aggregation']}`", f"{row['scale']:.3f}", single))
    return table(("framework", "aggregation", "factor on beta", "of single responses"), rows)
