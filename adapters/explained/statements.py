"""The statements about a run: what its KL terms are, which gradient they have, and how they reach the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kl_plugins.adapters.aggregations import RULES
from kl_plugins.adapters.explained.run import ConfiguredRun, Term
from kl_plugins.aggregation import MEANINGS
from kl_plugins.explain import explain
from kl_plugins.explain.stability import stability

SITES = {
    "loss": "in the loss, beside the policy loss",
    "reward": "in the reward, before advantages are computed",
    "advantage": "subtracted from the advantages",
}


def statements(run: ConfiguredRun, ignored: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield the statements about a run, each with its label.

    Args:
        run: the run.
        ignored: the settings that have no effect in it.
    """
    if not run.terms:
        yield "KL", "none: nothing in this run holds the policy near a reference."
    for number, term in enumerate(run.terms, 1):
        mark = f" {number}" if len(run.terms) > 1 else ""
        for label, text in _of_term(run, term):
            yield f"{label}{mark}", text
    if run.terms:
        yield "reference", f"{run.reference}."
    yield "sampling", f"{run.sampling}."
    yield "data", _data(run)
    if ignored:
        yield "no effect", f"{', '.join(ignored)}."


def _of_term(run: ConfiguredRun, term: Term) -> Iterator[tuple[str, str]]:
    told = explain(str(term.spec))
    yield "KL", f"{term.written}, {SITES[term.spec.placement]}; beta is {term.beta:g} ({term.beta_key})."
    if term.native:
        same = "Its gradient is that of" if term.equal else "Its gradient is that of no spec; the nearest is"
        yield "as a spec", f"{same} {term.spec}."
    if term.equal:
        yield "target", f"{told.target}: {told.target_text}."
        yield "fresh data", told.on_policy.text
        yield "stale data", told.off_policy.text + (f" {said}" if (said := stability(term.spec)) else "")
    else:
        yield "target", "none: it is the gradient of no divergence."
    yield "weight", f"{term.weight}."
    if term.clamp:
        yield "clamps", f"{term.clamp}."
    if term.rule is not None:
        rule = RULES[term.rule]
        meaning = MEANINGS[rule.kind]
        yield "aggregation", f"{term.rule_setting}: each token's KL is multiplied by {rule.factor}. With it, {meaning}."
    if term.site:
        yield "site", f"{term.site}."


def _data(run: ConfiguredRun) -> str:
    stale = run.staleness
    if stale.asynchronous:
        return f"stale: {stale.text}."
    if stale.updates is None:
        return f"unknown: {stale.text}."
    if stale.stale:
        return f"stale after the first update: {stale.text}."
    engine = ", as far as the engine computes the same probabilities as the trainer" if stale.engine else ""
    return f"fresh{engine}: {stale.text}."
