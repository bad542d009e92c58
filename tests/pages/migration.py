"""Tables of the hosts' own KL settings and the specs with the same gradient, as ``make bench-hosts`` measured them."""

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
"""The text that a user writes for each measured setting, by host and by its name in ``benchmarks.hosts.cases``."""

SYNONYMS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
"""Second names that veRL has for some estimators."""


@cache
def measured() -> dict[str, Any]:
    """Return the results of the measurement."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def settings(host: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the measured rows of a host, by setting and by scenario (``near`` or ``far`` from the reference)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measured()["native"]:
        if row["host"] == host:
            found.setdefault(row["setting"].rpartition(" (")[0], {})[row["scenario"]] = row
    return found


def part(host: str) -> str:
    """Return the table of the settings of one host."""
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
        return f"near the reference, by {near['distance']:.2f} of the gradient"
    if far["equal"]:
        return "at no measured point"
    dead = f"; {far['dead_tokens']} of {far['tokens']} tokens have no gradient" if far["dead_tokens"] else ""
    return f"far from the reference, by {far['distance']:.2f} of the gradient{dead}, because of the framework's clamps"


def beta_part() -> str:
    """Return the table of the factors on beta for each aggregation of each framework."""
    rows = []
    names = {"trl": "TRL, `loss_type`", "verl": "veRL, `loss_agg_mode`", "openrlhf": "OpenRLHF, KL loss"}
    for row in measured()["portable_beta"]:
        low, high = sorted(row["by_sequence"])
        single = "all the same" if high - low < 1e-5 else f"{low:.2f} to {high:.2f}"
        rows.append((names[row["host"]], f"`{row['aggregation']}`", f"{row['scale']:.3f}", single))
    return table(("framework", "aggregation", "factor on beta", "factor for single responses"), rows)
