"""Comparison of hosts with the core and with each other, after division by each host's documented normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import AGGREGATED_SPEC, AGGREGATIONS, BETA, NEAR, SPECS, Case, placement_of
from benchmarks.hosts.records import Record
from benchmarks.hosts.reference import Oracle

EQUAL = 1e-5
"""Largest relative difference at which two float32 gradients count as equal."""

CANDIDATES = (
    *SPECS,
    *("abs@loss", "k3+@loss", "k2@loss/is:token/behaviour:old/cap:10", "k2@loss/bound:2.3", "chi2@loss"),
    *("k2@reward/allow:biased", "k3@reward/allow:biased", "abs@reward/allow:biased"),
    *("k2@advantage/allow:biased", "k3@advantage/allow:biased"),
)
"""Specs that are compared with each host's own settings, to find the spec that a setting equals."""

TARGETS = {
    "reverse KL per token": "exact@loss",
    "reverse KL per token, sampled": "k2@loss/is:token/behaviour:old",
    "reverse KL of the sequence": "k2@loss/horizon:sequence/is:decision/behaviour:sampler",
    "forward KL per token": "k3@loss",
}
"""Targets that hosts' own settings are also compared with, on one batch, so the distance includes sampling noise."""


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected``, or the norm of the difference if that is 0."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size or 1.0)


def scale_between(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the factor that brings `expected` closest to `found`, and the relative rest that no factor explains."""
    found, expected = found.double(), expected.double()
    factor = (found @ expected / (expected @ expected)).item()
    return factor, relative(found / factor if factor else found, expected)


def coefficient(record: Record, weights: Tensor) -> Tensor:
    """Return the coefficient (B, T) that the host applied to each token, per unit of beta, without its aggregation."""
    return record.pull.double() / (BETA * weights)


def parity_row(oracle: Oracle, host: str, record: Record) -> dict[str, Any]:
    """Return the differences between one host and the core under one spec."""
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
        # The gradient of an exact KL itself goes through the logits and not through the tokens' log-probs.
        "coefficient": relative(applied[mask], expected.coefficient[mask]),
        "loss": None if expected.loss is None else abs(record.loss / (BETA * expected.loss) - 1),
        "log_probs": (record.log_probs - oracle.log_probs["current"])[mask].abs().max().item(),
        "coefficients": applied[mask].tolist(),
    }
    if exact_own and expected.coefficient.abs().max() == 0:
        row["coefficient"] = applied[mask].abs().max().item()
    return row


def parity(oracle: Oracle, found: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return the rows of all specs under each host's default aggregation, with the differences of pairs of hosts."""
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
    """Return the factors for each host's beta that give the same pull as a mean over all response tokens.

    `scale` is the measured factor, and `documented` is the factor from the host's documentation. If sequences have
    different weights, no single factor is right: `rest` is the remaining difference, and `by_sequence` holds the
    factors of the single sequences.
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
    """Compare specs under another setting of the worker: in 16 bits (``dtype``), or in more processes (``ranks``)."""
    return [
        {"host": host, **parity_row(oracle, host, record)}
        for host, records in found.items()
        for record in records
        if record.case.spec and setting in record.case.native
    ]


def native(oracle: Oracle, found: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return for each host's own settings the spec that each equals or is nearest to, and its distance from targets.

    If a setting equals a spec with the near reference, it is compared with the same spec with the far reference.
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
    """Return the row of one of a host's own settings."""
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
        # With a KL in the loss and no task reward, the loss is beta times the KL that was applied.
        "applied": record.loss / BETA if case.placement == "loss" else None,
        "logged": record.logged,
        "coefficients": applied.tolist(),
    }
