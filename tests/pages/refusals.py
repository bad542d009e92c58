"""Tables of what each host refuses and why, from the messages in its adapter and patches.

They are grouped by the time at which a user sees them: before or after a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.pages.messages import ROOT, Message, messages_in
from tests.pages.parts import table

EARLY = ("refusals", "observe", "config", "unsloth", "launch", "sampling", "versions")
"""Names of the files whose refusals come before a model is loaded; the refusals of all other files come later."""

SHARED = (
    "kl_plugins/sampling.py",
    "adapters/checkpoints.py",
    "adapters/controller.py",
    "adapters/log_probs.py",
    "adapters/micro_batch.py",
    "adapters/observe.py",
    "adapters/session.py",
    "adapters/versions.py",
    "patches/engine/fingerprint.py",
    "patches/engine/on_import.py",
    "patches/engine/patch.py",
)
"""Files whose refusals can occur in every host."""

INTERNAL = (
    "adapters/trl/__init__.py",
    "adapters/trl/observe.py:observation_of",
    "patches/trl/__init__.py:attach",
    "adapters/verl/config.py:aggregation_of",
    "patches/verl/worker.py:receipt",
    "patches/openrlhf/worker.py:receipt",
    "adapters/openrlhf/refusals.py:require_weights",
    "adapters/openrlhf/launch.py:__iter__",
    "adapters/openrlhf/launch.py:estimator",
)
"""Files and functions whose texts are not separate refusals, so that the tables leave them out."""


def shown(message: Message) -> bool:
    """Return whether the tables show a message as a refusal."""
    place = f"{message.file}:{message.function}"
    inner = any(place == name or message.file == name for name in INTERNAL)
    return not inner and "<problem>" not in message.text and "<subject>" not in message.text


def of_files(files: Iterable[str]) -> list[Message]:
    """Return the refusals in some files; equal texts are returned once."""
    found: dict[str, Message] = {}
    for file in files:
        for message in messages_in(file):
            if shown(message):
                found.setdefault(message.text, message)
    return list(found.values())


def of_host(host: str) -> list[Message]:
    """Return the refusals in the adapter and the patches of a host."""
    folders = [ROOT / layer / host for layer in ("adapters", "patches")]
    return of_files(str(path.relative_to(ROOT)) for folder in folders for path in sorted(folder.glob("*.py")))


def early(message: Message) -> bool:
    """Return whether the message comes before a model is loaded."""
    return Path(message.file).stem in EARLY


def cells(message: Message) -> tuple[str, str]:
    """Split a message into the problem and the remedy; the remedy is empty if the text has no separate one."""
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
"""The first words of remedies, by which the text of a message is split."""


def _cell(text: str) -> str:
    """Write placeholders in italics, so that browsers do not read them as tags; the rest of the text is kept."""
    text = text.replace("*", r"\*").replace("_", r"\_").replace("<...>", "…")
    return text.replace("<", "*⟨").replace(">", "⟩*").replace("*⟨ ", "< ").replace(" ⟩*", " >")


def host_part(host: str, when: str) -> str:
    """Return the table of the refusals of one host.

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        when: ``early`` for refusals before a model is loaded, or ``late``.
    """
    rows = [cells(message) for message in of_host(host) if early(message) == (when == "early")]
    return table(("refused, and why", "what to do"), rows)


def shared_part() -> str:
    """Return the table of the refusals that can occur in every host."""
    return table(("refused, and why", "what to do"), map(cells, of_files(SHARED)))
