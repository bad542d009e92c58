"""Hosts against the core and against one another, each host's documented normalisation divided out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import AGGREGATED_SPEC, AGGREGATIONS, BETA, NEAR, SPECS, Case, placement_of
from benchmarks.hosts.records import Record
from benchmarks.hosts.reference import Oracle

EQUAL = 1e-5
"""Relative difference up to which two float32 gradients are called equal."""

CANDIDATES = (
    *SPECS,
    *("abs@loss", "k3+@loss", "k2@loss/is:token/behaviour:old/cap:10", "k2@loss/bound:2.3", "chi2@loss"),
    *("k2@reward/allow:biased", "k3@reward/allow:biased", "abs@reward/allow:biased"),
    *("k2@advantage/allow:biased", "k3@advantage/allow:biased"),
)
"""Specs among which the one that a host's own setting equals is looked for."""

TARGETS = {
    "reverse KL per token": "exact@loss",
    "reverse KL per token, sampled": "k2@loss/is:token/behaviour:old",
    "reverse KL of the sequence": "k2@loss/horizon:sequence/is:decision/behaviour:sampler",
    "forward KL per token": "k3@loss",
}
"""What hosts' own settings are also held against: on one batch, so sampling noise is part of the distance."""


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; where that is 0, the difference's own norm."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size or 1.0)


def scale_between(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The factor that brings `expected` closest to `found`, and the relative rest that no factor explains."""
    found, expected = found.double(), expected.double()
    factor = (found @ expected / (expected @ expected)).item()
    return factor, relative(found / factor if factor else found, expected)


def coefficient(record: Record, weights: Tensor) -> Tensor:
    """(B, T) what the host applied to each token, per unit beta, its aggregation divided out."""
    return record.pull.double() / (BETA * weights)


def parity_row(oracle: Oracle, host: str, record: Record) -> dict[str, Any]:
    """How far one host is from the core under one spec."""
    case, batches = record.case, record.micro_batches
    expected, weights = oracle.expected(host, case, batches), oracle.weights(host, case.aggregation, batches)
    mask, applied = oracle.mask, coefficient(record, weights)
    exact_own = case.spec.startswith("exact@loss")
    row: dict[str, Any] = {
        "case": case.name,
        "spec": case.spec,
        "placement": case.placement,
        "aggregation": case.aggregation,
        "gradient": relative(oracle.flat(record.gradient), expected.gradient),
        # An exact KL's own gradient goes through the logits and not through the tokens' log-probs.
        "coefficient": relative(applied[mask], expected.coefficient[mask]),
        "loss": None if expected.loss is None else abs(record.loss / (BETA * expected.loss) - 1),
        "log_probs": (record.log_probs - oracle.log_probs["current"])[mask].abs().max().item(),
        "coefficients": applied[mask].tolist(),
    }
    if exact_own and expected.coefficient.abs().max() == 0:
        row["coefficient"] = applied[mask].abs().max().item()
    return row


def parity(oracle: Oracle, found: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Rows of all specs under each host's default aggregation, and pairs of hosts."""
    rows = []
    by_case: dict[str, dict[str, Record]] = {}
    for host, records in found.items():
        for record in records:
            if record.case.spec == record.case.name:
                rows.append({"host": host, **parity_row(oracle, host, record)})
                by_case.setdefault(record.case.name, {})[host] = record
    for row in rows:
        row["hosts"] = {
            other: relative(oracle.flat(by_case[row["case"]][row["host"]].gradient), oracle.flat(record.gradient))
            for other, record in by_case[row["case"]].items()
            if other != row["host"]
        }
    return rows


def portable_beta(oracle: Oracle, found: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """By what each host's beta has to be multiplied to pull as a mean over all response tokens would.

    `scale` is measured, `documented` is the same from the host's documentation. Where sequences weigh differently no
    one factor is right: `rest` is what it leaves, `by_sequence` the factors of single sequences.
    """
    rows = []
    for host, records in found.items():
        plain = Case(AGGREGATED_SPEC, AGGREGATED_SPEC, aggregation=AGGREGATIONS[host][0])
        for record in records:
            if record.case.spec != AGGREGATED_SPEC or record.case.native:
                continue
            base = oracle.gradient(oracle.expected(host, plain).coefficient, torch.ones(1, 1) / sum(oracle.lengths))
            factor, rest = scale_between(oracle.flat(record.gradient), base)
            weights = oracle.weights(host, record.case.aggregation, record.micro_batches) * sum(oracle.lengths)
            documented, _ = scale_between(oracle.expected(host, record.case, record.micro_batches).gradient, base)
            rows.append(
                {
                    "host": host,
                    "aggregation": record.case.aggregation,
                    "scale": 1 / factor,
                    "documented": 1 / documented,
                    "rest": rest,
                    "by_sequence": [(1 / weights.min()).item(), (1 / weights.max()).item()],
                }
            )
    return rows


def otherwise(oracle: Oracle, found: Mapping[str, Sequence[Record]], setting: str) -> list[dict[str, Any]]:
    """Specs under another setting of the worker than the comparison's: in 16 bits (``dtype``), in more processes."""
    return [
        {"host": host, **parity_row(oracle, host, record)}
        for host, records in found.items()
        for record in records
        if record.case.spec and setting in record.case.native
    ]


def native(oracle: Oracle, found: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """What each host's own settings do: the spec that each equals or is nearest to, and its distance from targets.

    A setting that equals a spec as long as the reference is near is held against that same spec where it is far.
    """
    rows: list[dict[str, Any]] = []
    for host, records in found.items():
        meant: dict[str, str] = {}
        for record in records:
            if record.case.spec:
                continue
            row = {"host": host, **native_row(oracle, host, record)}
            setting = record.case.name.rpartition(" (")[0]
            if record.case.scenario == NEAR and row["equal"]:
                meant[setting] = row["nearest"]
            elif setting in meant:
                row |= {"nearest": meant[setting], "distance": row["distances"][meant[setting]]}
                row["equal"] = row["distance"] <= EQUAL
            rows.append(row)
    return rows


def native_row(oracle: Oracle, host: str, record: Record) -> dict[str, Any]:
    """One of a host's own settings."""
    gradient, case = oracle.flat(record.gradient), record.case
    distances = {}
    for spec in CANDIDATES:
        if spec.startswith("exact") and case.scenario != NEAR:
            continue
        candidate = Case(spec, spec, {}, placement_of(spec), case.scenario, case.aggregation)
        distances[spec] = relative(gradient, oracle.expected(host, candidate, record.micro_batches).gradient)
    nearest = min(distances, key=distances.__getitem__)
    applied = coefficient(record, oracle.weights(host, case.aggregation, record.micro_batches))[oracle.mask]
    return {
        "setting": case.name,
        "scenario": case.scenario,
        "placement": case.placement,
        "nearest": nearest,
        "distance": distances[nearest],
        "equal": distances[nearest] <= EQUAL,
        "distances": distances,
        "targets": {name: distances[spec] for name, spec in TARGETS.items() if spec in distances},
        "dead_tokens": int((applied == 0).sum()),
        "tokens": applied.numel(),
        # A KL in the loss, and no task reward: the loss is beta times the KL that was applied.
        "applied": record.loss / BETA if case.placement == "loss" else None,
        "logged": record.logged,
        "coefficients": applied.tolist(),
    }
