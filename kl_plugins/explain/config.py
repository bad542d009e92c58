"""What ``kl-plugins explain --host`` says about a config; the adapters of the hosts fill it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""All severities, the worst first."""


@dataclass(frozen=True)
class ConfigFinding:
    """One thing to know about a config.

    Attributes:
        rule: the name of the rule that found it.
        severity: ``error`` where the KL term does not regularise, is not the one that the settings name, or stops the
            run; ``warning`` where it is another one than most people expect; ``note`` for everything else.
        setting: the settings that it comes from, each with its value and the place where it was found.
        statement: what is the case.
        source: a paper, an issue, or a function of the host in which it can be checked.
        remedy: what the user can do; empty if there is nothing to do.
    """

    rule: str
    severity: Severity
    setting: str
    statement: str
    source: str
    remedy: str


@dataclass(frozen=True)
class Suggestion:
    """Settings to paste.

    Attributes:
        title: what they achieve.
        lines: the settings in the host's own form.
        reason: why, and what beta means there.
    """

    title: str
    lines: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class ConfigExplanation:
    """What a run with a config optimises.

    Attributes:
        host: the name of the host.
        version: the version that was assumed.
        version_from: where the version comes from.
        algorithm: the trainer or estimator of advantages.
        settings: the settings about the KL that were found, each with its place.
        statements: label -> what the run does.
        findings: all findings, the worst first.
        suggestions: settings to paste.
    """

    host: str
    version: str
    version_from: str
    algorithm: str
    settings: tuple[str, ...]
    statements: Mapping[str, str]
    findings: tuple[ConfigFinding, ...]
    suggestions: tuple[Suggestion, ...]

    @property
    def status(self) -> int:
        """The exit status of the command: 1 if there is an error, else 0."""
        return int(any(finding.severity == "error" for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain data that can be written as JSON."""
        return asdict(self)


class ConfigExplainer(Protocol):
    """The module that :attr:`kl_plugins.hosts.Host.explainer` names. It imports neither the host nor torch."""

    def explain_config(
        self, words: Sequence[str], version: str, version_from: str, length: float | None = None
    ) -> ConfigExplanation:
        """Explain a config.

        Args:
            words: files, arguments or overrides, as :func:`kl_plugins.settings.read_words` takes them.
            version: the version of the host to assume.
            version_from: where the version comes from, in words.
            length: mean number of tokens of a response, for the equivalent beta; None if it is not known.

        Raises:
            UnreadableError: one of the words cannot be read.
        """
