"""Rules about configs as data, and how they become findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.explained.run import ConfiguredRun
from kl_plugins.explain.config import SEVERITIES, ConfigFinding, Severity

R = TypeVar("R", bound=ConfiguredRun)
R_contra = TypeVar("R_contra", bound=ConfiguredRun, contravariant=True)

ALL_HOSTS = ("trl", "verl", "openrlhf")


@dataclass(frozen=True)
class Rule(Generic[R_contra]):
    """One thing to know about some configs.

    Attributes:
        id: its name.
        hosts: the hosts that it is about.
        severity: see :class:`~kl_plugins.explain.config.ConfigFinding`.
        settings: the settings that a finding comes from, or a function that gives them.
        when: whether it holds for a run.
        words: the statement, or a function that makes it.
        source: a paper, an issue, or a function of the host.
        remedy: what the user can do; empty if there is nothing to do.
        versions: the versions of the host that it is about, as a specifier; empty for all.
        ignored: gives the settings that have no effect where it holds; None if it is not about that.
    """

    id: str
    hosts: tuple[str, ...]
    severity: Severity
    settings: tuple[str, ...] | Callable[[R_contra], Iterable[str]]
    when: Callable[[R_contra], bool]
    words: str | Callable[[R_contra], str]
    source: str
    remedy: str = ""
    versions: str = ""
    ignored: Callable[[R_contra], Iterable[str]] | None = None

    def holds(self, run: R_contra) -> bool:
        """Return whether the rule is about a run.

        Args:
            run: the run.
        """
        if self.versions and not SpecifierSet(self.versions).contains(run.version, prereleases=True):
            return False
        return run.host.name in self.hosts and self.when(run)

    def finding(self, run: R_contra) -> ConfigFinding | None:
        """Return the finding about a run, or None if the rule does not hold for it.

        Args:
            run: the run.
        """
        if not self.holds(run):
            return None
        keys = self.settings(run) if callable(self.settings) else self.settings
        shown = ", ".join(dict.fromkeys(run.shown(key) for key in keys))
        words = self.words(run) if callable(self.words) else self.words
        return ConfigFinding(self.id, self.severity, shown, words.rstrip("."), self.source, self.remedy)


def findings(rules: Iterable[Rule[R]], run: R) -> tuple[ConfigFinding, ...]:
    """Return all findings about a run, the worst first.

    Args:
        rules: the rules.
        run: the run.
    """
    found = [*_problems(run), *(finding for rule in rules if (finding := rule.finding(run)) is not None)]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def ignored(rules: Iterable[Rule[R]], run: R) -> tuple[str, ...]:
    """Return the settings that have no effect in a run, each with its value and place.

    Args:
        rules: the rules.
        run: the run.
    """
    keys = (key for rule in rules if rule.ignored is not None and rule.holds(run) for key in rule.ignored(run))
    return tuple(dict.fromkeys(run.shown(key) for key in keys))


def _problems(run: ConfiguredRun) -> Iterator[ConfigFinding]:
    for key, problem in run.problems:
        text, _, remedy = problem.partition("; ")
        yield ConfigFinding(
            "refused", "error", run.shown(key), f"kl-plugins refuses this spec: {text}", "kl-plugins", remedy
        )
    for note in run.settings.notes:
        yield ConfigFinding("reading", "note", "", note, "kl-plugins", "")
