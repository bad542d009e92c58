"""What each host refuses and why: the messages in its adapter and patches, grouped by when a user meets them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.pages.messages import ROOT, Message, messages_in
from tests.pages.parts import table

EARLY = ("guards", "settings", "support", "unsloth", "ray_job", "sampling", "checks", "config")
"""Files whose refusals come before a model is loaded; those of all others come later."""

SHARED = (
    "kl_plugins/sampling.py",
    "adapters/checkpoints.py",
    "adapters/controller.py",
    "adapters/log_probs.py",
    "adapters/micro_batch.py",
    "patches/checks.py",
    "patches/guards.py",
)
"""Files whose refusals every host has."""

INTERNAL = (
    "adapters/trl/__init__.py",
    "adapters/openrlhf/flag.py",
    "adapters/trl/config.py:parse",
    "patches/trl/__init__.py:attach",
    "adapters/verl/settings.py:aggregation_of",
    "patches/verl/worker.py:receipt",
    "patches/openrlhf/worker.py:receipt",
    "adapters/openrlhf/settings.py:require_weights",
)
"""Files and functions whose texts are no refusals of their own."""


def shown(message: Message) -> bool:
    """Whether a message is a refusal of its own."""
    place = f"{message.file}:{message.function}"
    inner = any(place == name or message.file == name for name in INTERNAL)
    return not inner and "<problem>" not in message.text and "<subject>" not in message.text


def of_files(files: Iterable[str]) -> list[Message]:
    """The refusals in some files, each text once."""
    found: dict[str, Message] = {}
    for file in files:
        for message in messages_in(file):
            if shown(message):
                found.setdefault(message.text, message)
    return list(found.values())


def of_host(host: str) -> list[Message]:
    """The refusals that only this host has."""
    folders = [ROOT / layer / host for layer in ("adapters", "patches")]
    return of_files(str(path.relative_to(ROOT)) for folder in folders for path in sorted(folder.glob("*.py")))


def early(message: Message) -> bool:
    """Whether it comes before a model is loaded."""
    return Path(message.file).stem in EARLY


def cells(message: Message) -> tuple[str, str]:
    """The problem, and what to do, where the text tells them apart."""
    text = message.text.removeprefix("kl-plugins: ")
    for mark in ("; ", ". "):
        problem, found, remedy = text.rpartition(mark)
        if found and remedy.split()[0].lower() in _VERBS:
            return _cell(problem), _cell(remedy[0].upper() + remedy[1:])
    return _cell(text), ""


_VERBS = frozenset(
    {
        "set",
        "use",
        "drop",
        "leave",
        "unset",
        "sample",
        "delete",
        "put",
        "resume",
        "undo",
        "install",
        "remove",
        "attach",
        "run",
    }
)
"""Words with which a remedy begins."""


def _cell(text: str) -> str:
    """Placeholders in italics, so that no browser takes them for tags; settings stay as they are."""
    text = text.replace("*", r"\*").replace("_", r"\_").replace("<...>", "…")
    return text.replace("<", "*⟨").replace(">", "⟩*").replace("*⟨ ", "< ").replace(" ⟩*", " >")


def host_part(host: str, when: str) -> str:
    """The table of one host.

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        when: ``early`` or ``late``.
    """
    rows = [cells(message) for message in of_host(host) if early(message) == (when == "early")]
    return table(("refused, and why", "what to do"), rows)


def shared_part() -> str:
    """The table of refusals that every host has."""
    return table(("refused, and why", "what to do"), map(cells, of_files(SHARED)))
