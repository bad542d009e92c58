"""Structured explanation of a KL spec: formulas, which gradient they estimate, and their caveats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kl_plugins.aggregation import MEANINGS
from kl_plugins.explain.bias import Estimate, off_policy, on_policy, why_none
from kl_plugins.explain.formulas import formulas
from kl_plugins.explain.notes import notes, observing
from kl_plugins.explain.options import Option, options_in_effect
from kl_plugins.explain.sources import Source, sources
from kl_plugins.spec import PRESETS, KLSpec, KLSpecError
from kl_plugins.spec.observation import Observation, looks_like_observation
from kl_plugins.spec.options import ALLOW_BIASED
from kl_plugins.spec.presets import NOTES
from kl_plugins.spec.target import TARGETS

if TYPE_CHECKING:
    from kl_plugins.hosts import Host

__all__ = ["Estimate", "Explanation", "Option", "Source", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The full explanation of one spec that ``kl-plugins explain`` shows.

    Attributes:
        written: the text that was explained.
        spec: its canonical form, including ``allow:biased`` if it is required.
        needs_allow_biased: whether the text lacks the ``allow:biased`` that a run would require.
        notes: notes on the most likely misunderstandings.
        formulas: value, weight, and the coefficient or penalty as applied, by name.
        target, target_text: the gradient that is estimated in expectation, as a key and in words.
        why_none: the reason why no divergence is estimated; empty if one is estimated.
        on_policy, off_policy: what is estimated on each kind of data, with the bias.
        caveats: reasons why the estimate can deviate although the target stays the same.
        aggregation: effect on the target of each way to aggregate the tokens' terms, by name.
        host_aggregation: host -> the way to aggregate that it uses, and the setting that selects it.
        needs_behaviour, needs_exact: whether these inputs are required besides policy and reference log-probs.
        options: every option in effect.
        presets: names of the presets that equal this spec -> where they come from.
        hosts: host -> where to put the spec in its configuration.
        sources: references.
    """

    written: str
    spec: str
    needs_allow_biased: bool
    notes: tuple[str, ...]
    formulas: Mapping[str, str]
    target: str
    target_text: str
    why_none: str
    on_policy: Estimate
    off_policy: Estimate
    caveats: tuple[str, ...]
    aggregation: Mapping[str, str]
    host_aggregation: Mapping[str, str]
    needs_behaviour: bool
    needs_exact: bool
    options: tuple[Option, ...]
    presets: Mapping[str, str]
    hosts: Mapping[str, str]
    sources: tuple[Source, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain data that can be written as JSON."""
        return asdict(self)


def explain(text: str, hosts: Iterable[Host] = ()) -> Explanation:
    """Explain a spec or preset, including one that would need ``allow:biased`` to run, or one that is only observed.

    Args:
        text: a spec, the name of a preset, or a text with ``observe`` and a spec.
        hosts: hosts whose configuration keys are explained.

    Returns:
        The explanation.

    Raises:
        KLSpecError: if the text is not a valid spec.
        ValueError: if the text observes the host's own KL, which no spec describes without the host's settings.
    """
    observation = Observation.parse(text) if looks_like_observation(text) else None
    spec, forgiven = _parse_forgiving(text) if observation is None else (observation.measured, False)
    hosts = tuple(hosts)
    return Explanation(
        written=text,
        spec=str(spec),
        needs_allow_biased=forgiven,
        notes=notes(spec) if observation is None else (observing(observation), *notes(spec)),
        formulas=formulas(spec),
        target=spec.target,
        target_text=TARGETS[spec.target],
        why_none=why_none(spec),
        on_policy=on_policy(spec),
        off_policy=off_policy(spec),
        caveats=spec.caveats,
        aggregation=MEANINGS,
        host_aggregation={host.name: host.aggregation for host in hosts if host.aggregation},
        needs_behaviour=spec.needs_behaviour,
        needs_exact=spec.needs_exact,
        options=options_in_effect(spec),
        presets={name: NOTES[name] for name, preset in PRESETS.items() if KLSpec.parse(preset) == spec},
        hosts={host.name: host.keys.get(spec.placement, "no place for this placement") for host in hosts},
        sources=sources(spec),
    )


def _parse_forgiving(text: str) -> tuple[KLSpec, bool]:
    """Return the spec, and whether ``allow:biased`` was added. A spec needs it to run, but not to be explained."""
    try:
        return KLSpec.parse(text), False
    except KLSpecError as error:
        try:
            return KLSpec.parse(f"{text.strip()}/{ALLOW_BIASED}"), True
        except KLSpecError:
            raise error from None
