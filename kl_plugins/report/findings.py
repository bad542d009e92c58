"""Findings in words: every rule on every run, and what the log of a run without kl-plugins can and cannot say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kl_plugins.report.native import UNKNOWN, Role
from kl_plugins.report.rules import LEVELS, RULES, Level, Rule
from kl_plugins.report.run import Run

NOT_ACTIVE = "not-active"
"""Name of the finding about a log without metrics of kl-plugins."""

SHOWN_TOGETHER = 4
"""Number of metrics that one finding names; the others are counted."""


@dataclass(frozen=True)
class Finding:
    """One sentence about one run.

    Attributes:
        rule: name of the rule.
        level: how serious it is.
        run: name of the run.
        key: the metric that it is about.
        text: the sentence.
        remedy: what can be done about it.
        source: where the rule comes from.
        since: the step from which on it holds, if it lasts.
        limit: the limit of the rule, if it can be drawn beside the metric.
    """

    rule: str
    level: Level
    run: str
    key: str
    text: str
    remedy: str
    source: str
    since: int | None = None
    limit: float | None = None


DRAWN = ("above", "below")
"""Functions of :mod:`kl_plugins.report.facts` whose limit is a value of the metric itself."""


def find(runs: Iterable[Run]) -> list[Finding]:
    """Return all findings about some runs, the serious ones first."""
    found = [finding for run in runs for finding in _of_run(run)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def looked_at(rule: Rule, run: Run) -> list[str]:
    """Return the metrics of a run that a rule looks at."""
    keys: list[str] = []
    for name in rule.metrics:
        if name == "*":
            keys += run.series
        elif name.startswith("@"):
            role: Role = name[1:]  # type: ignore[assignment]
            # A run under a spec has better numbers than the framework's own KL and coefficient.
            if role not in ("kl", "beta") or not run.active:
                keys += run.of_role(role)
        elif name in run.series:
            keys.append(name)
    return keys


def number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}"


def _of_run(run: Run) -> Iterator[Finding]:
    if not run.active:
        yield _not_active(run)
    for rule in RULES:
        found = [(key, fact) for key in looked_at(rule, run) if (fact := rule.look(run.series[key], rule.limit))]
        if rule.metrics == ("*",) and len(found) > 1:
            # A broken run has many such metrics. They are one finding, about the first step.
            found.sort(key=lambda pair: pair[1].first)
            names = [key for key, _ in found]
            more = f" and {len(names) - SHOWN_TOGETHER} more" if len(names) > SHOWN_TOGETHER else ""
            text = f"First in step {found[0][1].first}, these metrics are not finite numbers: "
            text += ", ".join(names[:SHOWN_TOGETHER]) + more + "."
            yield Finding(rule.name, rule.level, run.name, names[0], text, rule.remedy, rule.source, found[0][1].first)
            continue
        for key, fact in found:
            text = rule.says.format(
                when=fact.when(), key=key, value=number(fact.value), before=number(fact.before), first=fact.first
            )
            limit = rule.limit if rule.look.__name__ in DRAWN else None
            since = fact.first if fact.lasting and not fact.always else None
            yield Finding(rule.name, rule.level, run.name, key, text, rule.remedy, rule.source, since, limit)


def _not_active(run: Run) -> Finding:
    who = run.logs.title if run.logs else ""
    parts = ["This log has no kl/ metric, so kl-plugins was not active in this run."]
    kls = run.of_role("kl")
    for key in kls:
        known = run.known[key].meaning
        parts.append(f"{who}'s {key} {known}." if known else f"{key} looks like a KL. {UNKNOWN}")
    parts += [f"{key} {run.known[key].meaning}." for key in run.of_role("other_kl")]
    if kls:
        parts.append("A value does not show which gradient the term has.")
    else:
        parts.append("It has no metric that this page knows as a KL to the reference either.")
    remedy = "To see weights, coefficients and dead gradients as well, run with a spec."
    return Finding(NOT_ACTIVE, "note", run.name, kls[0] if kls else "", " ".join(parts), remedy, "the log itself")
