"""The cases that run in every host: specs for the comparison, and each host's own KL settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

HOSTS = ("trl", "verl", "openrlhf")
NAMES = {"trl": "TRL", "verl": "veRL", "openrlhf": "OpenRLHF"}
BETA = 0.25
NEAR, FAR = "near", "far"
"""Scenarios: a reference within a nat of the policy on most tokens, and one so far away that hosts' clamps matter."""

SPECS = (
    *("k1@loss/allow:biased", "k2@loss", "k3@loss"),
    *(f"k{n}@loss/is:token/behaviour:{source}" for n in (2, 3) for source in ("old", "sampler")),
    *(f"k{n}@loss/is:prefix/behaviour:{source}" for n in (2, 3) for source in ("old", "sampler")),
    *("k1@loss/is:token/behaviour:old/allow:biased", "k1@loss/is:prefix/behaviour:sampler/allow:biased"),
    *("k2@loss/is:token/behaviour:sampler/cap:1.1", "k2@loss/is:token/behaviour:sampler/floor:0.95"),
    "k2@loss/horizon:sequence/future:k3",
    "k2@loss/horizon:sequence/is:decision/behaviour:sampler",
    *("exact@loss", "exact@loss/horizon:sequence/is:decision/behaviour:sampler"),
    *("k1@reward", "k1@advantage", "k1@advantage/horizon:token"),
)
SMOKE_SPECS = ("k2@loss", "k2@loss/is:token/behaviour:sampler", "exact@loss", "k1@reward", "k1@advantage")

AGGREGATIONS = {
    "trl": ("dapo", "grpo", "bnpo", "dr_grpo", "luspo"),
    "verl": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    "openrlhf": ("token-mean",),
}
"""Ways in which a host can sum the KL over tokens and sequences; its default is the first."""

AGGREGATED_SPEC = "k2@loss"

PARALLEL_SPECS = ("k2@loss/is:token/behaviour:sampler", "k2@loss/horizon:sequence/future:k3", "k1@advantage")
"""Specs that also run in two processes, if the host's worker can, to test the data-parallel factor."""


@dataclass(frozen=True)
class Case:
    """One update of one host.

    Attributes:
        name: unique within the host.
        spec: spec of kl-plugins; empty for the host's own KL.
        native: settings that only the host's worker reads: its own ``estimator`` and flags, its ``dtype``, and the
            number of its processes (``ranks``).
        placement: where the KL enters: ``loss``, ``reward`` or ``advantage``.
        scenario: ``near`` or ``far``.
        aggregation: one of the host's :data:`AGGREGATIONS`.
    """

    name: str
    spec: str = ""
    native: dict[str, Any] = field(default_factory=dict)
    placement: str = "loss"
    scenario: str = NEAR
    aggregation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the case as plain data, for the file that workers read."""
        return asdict(self)


NATIVE: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "trl": (
        ("k3", "loss", {"use_bias_correction_kl": False}),
        ("k3, use_bias_correction_kl", "loss", {"use_bias_correction_kl": True}),
        (
            "k3, use_bias_correction_kl, sequence level",
            "loss",
            {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
        ),
    ),
    "verl": (
        *((name, "loss", {"estimator": name}) for name in ("kl", "abs", "mse", "low_var_kl")),
        *((name, "loss", {"estimator": name}) for name in ("kl+", "abs+", "low_var_kl+")),
        *((f"{name} in reward", "reward", {"estimator": name}) for name in ("kl", "abs", "mse", "low_var_kl")),
    ),
    "openrlhf": (
        *((f"k{n}, use_loss", "loss", {"estimator": f"k{n}"}) for n in (1, 2, 3)),
        *(
            (f"k{n}, use_loss, unbiased_gradient", "loss", {"estimator": f"k{n}", "unbiased_gradient": True})
            for n in (1, 2, 3)
        ),
        *((f"k{n} in reward", "reward", {"estimator": f"k{n}"}) for n in (1, 2, 3)),
    ),
}
"""Each host's own KL settings: name, placement, and the settings of its worker."""

SMOKE_NATIVE = {"trl": 2, "verl": 4, "openrlhf": 3}


def placement_of(spec: str) -> str:
    """Return ``loss``, ``reward`` or ``advantage``, without an import of kl_plugins."""
    return spec.split("@")[1].split("/")[0]


def cases(host: str, smoke: bool = False) -> list[Case]:
    """Return every update that a host makes, with its default aggregation first."""
    default, *others = AGGREGATIONS[host]
    specs = SMOKE_SPECS if smoke else SPECS
    found = [Case(text, text, placement=placement_of(text), aggregation=default) for text in specs]
    for mode in others[: 1 if smoke else None]:
        found.append(Case(f"{AGGREGATED_SPEC} under {mode}", AGGREGATED_SPEC, aggregation=mode))
    if host != "trl" and not smoke:
        for text in PARALLEL_SPECS:
            two = {"ranks": 2}
            found.append(Case(f"{text} in 2 processes", text, two, placement_of(text), aggregation=default))
    if host == "openrlhf":
        sixteen = {"dtype": "bf16"}
        found.append(Case(f"{AGGREGATED_SPEC} in bf16", AGGREGATED_SPEC, sixteen, aggregation=default))
    for name, placement, settings in NATIVE[host][: SMOKE_NATIVE[host] if smoke else None]:
        for scenario in (NEAR,) if smoke else (NEAR, FAR):
            found.append(Case(f"{name} ({scenario})", "", settings, placement, scenario, default))
    return found
