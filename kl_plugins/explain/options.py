"""Descriptions of the options of a spec, as data for ``kl-plugins explain`` and as a table in Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins.spec import KLSpec
from kl_plugins.spec.options import OPTIONS

PLACEMENT_MEANINGS: dict[str, str] = {
    "loss": "a differentiable term beside the policy loss; its coefficient is the gradient",
    "reward": "into the host's own KL-in-reward site; what the host does with it is in its receipt",
    "advantage": "subtracted from per-token advantages after they are normalised",
}


@dataclass(frozen=True)
class Option:
    """One option in effect: its value as text, whether this is the default, and what it does in this spec."""

    name: str
    value: str
    default: bool
    meaning: str


def options_in_effect(spec: KLSpec) -> tuple[Option, ...]:
    """Return every option that has an effect in this spec, in canonical order."""
    found = ((row, row.in_effect(spec)) for row in OPTIONS.values())
    return tuple(Option(row.name, effect[0], not row.is_set(spec), effect[1]) for row, effect in found if effect)


def markdown_table() -> str:
    """Return the options as a Markdown table, in canonical order: name, values, meaning."""
    lines = ["| option | values | meaning |", "|---|---|---|"]
    for row in OPTIONS.values():
        name = row.name if row.values.is_flag else f"{row.name}:"
        forms = ", ".join(f"`{form}`" for form in row.values.forms) or "-"
        meaning = row.meaning.replace("|", r"\|")  # An unescaped bar would end the table cell.
        lines.append(f"| `{name}` | {forms} | {meaning} |")
    return "\n".join(lines)
