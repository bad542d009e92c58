"""References for each part of a spec."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins.explain.formulas import UNSTATED, row_of
from kl_plugins.spec import KLSpec
from kl_plugins.spec.options import OPTIONS


@dataclass(frozen=True)
class Source:
    """A reference, and the part of the spec that comes from it."""

    reference: str
    topic: str


def sources(spec: KLSpec) -> tuple[Source, ...]:
    """Return the references for the estimator, the placement and the options of a spec, each once."""
    row = row_of(spec)
    found = [
        (part.strip(), f"the estimator {spec.estimator}") for part in row.source.split(";") if row.source != UNSTATED
    ]
    found.append(("arXiv 2510.01555", "the gradient coefficient counts, not the value; which placements agree"))
    if spec.placement == "reward":
        found.append(("arXiv 1909.08593", "KL in the reward"))
    if spec.placement == "advantage":
        found.append(("arXiv 2601.10201", "reward-to-go KL beside normalised advantages; the future-KL term"))
    if spec.target == "none" or spec.placement == "reward":
        found.append(("arXiv 2512.21852", "estimators in reward and in loss compared in training"))
    if spec.placement == "loss":
        found.append(("arXiv 2506.09477", "token-level losses lack the future-KL term; the sequence gradient"))
    if spec.estimator == "k3+" and spec.correction == "token":
        found.append(("DeepSeek-V3.2 report (arXiv 2512.02556)", "k3 times the live token ratio"))
    found += filter(None, (row.said(row.source, spec, None) for row in OPTIONS.values()))
    topics: dict[str, list[str]] = {}
    for reference, topic in found:
        topics.setdefault(reference, []).append(topic)
    return tuple(Source(reference, "; ".join(each)) for reference, each in topics.items())
