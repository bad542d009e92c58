"""Structured explanation of a KL spec: formulas, which gradient they estimate, and their caveats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kl_plugins.aggregation import MEANINGS
from kl_plugins.explain.bias import Estimate, off_policy, on_policy, why_none
from kl_plugins.explain.formulas import formulas
from kl_plugins.explain.notes import notes
from kl_plugins.explain.options import Option, options_in_effect
from kl_plugins.explain.sources import Source, sources
from kl_plugins.spec import PRESETS, KLSpec, KLSpecError
from kl_plugins.spec.options import ALLOW_BIASED
from kl_plugins.spec.presets import NOTES
from kl_plugins.spec.target import TARGETS

if TYPE_CHECKING:
    from kl_plugins.hosts import Host

__all__ = ["Estimate", "Explanation", "Option", "Source", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Everything ``kl-plugins explain`` says about one spec.

    Attributes:
        written: what was asked about.
        spec: its canonical form, ``allow:biased`` included where it is required.
        needs_allow_biased: it was written without the ``allow:biased`` that a run would demand.
        notes: what a reader is most likely to be wrong about.
        formulas: value, weight, and the coefficient or penalty as applied, by name.
        target, target_text: which gradient the expectation estimates.
        why_none: why no divergence is estimated; empty where one is.
        on_policy, off_policy: what is estimated on each kind of data, with the bias.
        caveats: what bends the estimate although the target stays.
        aggregation: what each way in which a host joins the tokens' terms does to the target, by name.
        host_aggregation: host -> which of them it uses, and the setting that decides it.
        needs_behaviour, needs_exact: what has to be passed beside policy and reference log-probs.
        options: every option in effect.
        presets: names of the presets that are this spec -> where they come from.
        hosts: host -> where the spec goes in its configuration.
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
        """Return the explanation as plain data, which JSON can hold."""
        return asdict(self)


def explain(text: str, hosts: Iterable[Host] = ()) -> Explanation:
    """Explain a spec or preset, also one that would need ``allow:biased`` to run.

    Args:
        text: a spec or the name of a preset.
        hosts: hosts to say the configuration key of.

    Returns:
        The explanation.

    Raises:
        KLSpecError: the text is no spec.
    """
    spec, forgiven = _parse_forgiving(text)
    hosts = tuple(hosts)
    return Explanation(
        written=text,
        spec=str(spec),
        needs_allow_biased=forgiven,
        notes=notes(spec),
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
    """The spec, and whether ``allow:biased`` had to be added: explaining a biased spec is not running it."""
    try:
        return KLSpec.parse(text), False
    except KLSpecError as error:
        try:
            return KLSpec.parse(f"{text.strip()}/{ALLOW_BIASED}"), True
        except KLSpecError:
            raise error from None
