"""``kl-plugins explain``: prints the explanation of a spec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kl_plugins.cli.output import Page, Row, fail, fail_spec, print_json
from kl_plugins.explain import Explanation, explain
from kl_plugins.explain.notes import observing
from kl_plugins.hosts import discover_hosts
from kl_plugins.spec import KLSpecError
from kl_plugins.spec.observation import Observation, looks_like_observation

if TYPE_CHECKING:
    from kl_plugins.hosts import HostRegistry


def explain_command(text: str, as_json: bool) -> int:
    """Explain a spec and print the result.

    Args:
        text: the spec or preset as the user wrote it.
        as_json: whether to print JSON instead of text.

    Returns:
        The exit status: 0, or 2 for an invalid spec, or 1 if a third-party package of estimators is broken.
    """
    registry = discover_hosts()
    try:
        if looks_like_observation(text) and not (observation := Observation.parse(text)).named:
            return _observe(observation, registry, as_json)
        explanation = explain(text, registry.hosts.values())
    except KLSpecError as error:
        if Path(text).is_file():
            hosts = "|".join(name for name, host in registry.hosts.items() if host.explainer)
            return fail(f"kl-plugins: {text} is a file; for a config add --host {hosts}", as_json, 2)
        return fail_spec(error, as_json)
    except RuntimeError as error:
        return fail(f"kl-plugins: {error}", as_json, 1)
    if as_json:
        return print_json(explanation.to_dict())
    _print(explanation, registry)
    return 0


def _observe(observation: Observation, registry: HostRegistry, as_json: bool) -> int:
    """Print what ``observe`` without a spec does; which spec that is, only the settings of a host say."""
    hosts = "|".join(name for name, host in registry.hosts.items() if host.explainer)
    ask = f"Which spec that is, your config says: kl-plugins explain --host {hosts} CONFIG"
    note = observing(observation).partition(" Everything below")[0]
    if as_json:
        return print_json({"written": str(observation), "notes": [note, ask]})
    page = Page()
    page.title(str(observation))
    page.paragraph(note)
    page.paragraph(ask)
    return 0


def _print(it: Explanation, registry: HostRegistry) -> None:
    page = Page()
    page.title(it.spec)
    if it.needs_allow_biased:
        page.paragraph(
            "A run refuses this spec unless /allow:biased is added, because its gradient is that of no divergence.",
            "yellow",
        )
    for note in it.notes:
        page.paragraph(note)
    page.section("What is computed", it.formulas.items())
    page.section("Which gradient it estimates", _gradient(it))
    page.section("Caveats", (("-", caveat) for caveat in it.caveats))
    page.section("How the host's aggregation changes it", [*it.aggregation.items(), *it.host_aggregation.items()])
    page.section("What it needs", _needs(it))
    page.section(
        "Options in effect",
        ((f"{o.name}{o.value and ':'}{o.value}", o.meaning + " (default)" * o.default) for o in it.options),
    )
    page.section("Presets that are this spec", it.presets.items())
    page.section("Where it goes", [*it.hosts.items(), *_broken(registry)])
    page.section("Sources", ((source.reference, source.topic) for source in it.sources))


def _gradient(it: Explanation) -> Iterator[Row]:
    yield "target", f"{it.target}: {it.target_text}"
    yield "on-policy", it.on_policy.text
    same = it.off_policy.text == it.on_policy.text
    yield "off-policy", "The same as on-policy." if same else it.off_policy.text


def _needs(it: Explanation) -> Iterator[Row]:
    yield (
        "log-probs",
        "of the policy and of the reference" + (", and of the behaviour policy" if it.needs_behaviour else ""),
    )
    if not it.needs_behaviour:
        yield "", "the behaviour policy's log-probs are not needed"
    if it.needs_exact:
        yield "exact", "the full-vocabulary KL of every state; with top: that of set and bucket, and the remainder"


def _broken(registry: HostRegistry) -> Iterator[Row]:
    for host in registry.broken:
        yield host.name, "cannot be loaded: see kl-plugins doctor"
