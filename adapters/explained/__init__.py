"""What a host's config optimises, in plain words: rules, statements and suggestions that all hosts share.

``adapters/<host>/explained/`` says what the settings of one host mean. Neither a host nor torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable

from kl_plugins.adapters.explained.common import COMMON
from kl_plugins.adapters.explained.rules import R, Rule, findings, ignored
from kl_plugins.adapters.explained.statements import statements
from kl_plugins.adapters.explained.suggest import suggestions
from kl_plugins.explain.config import ConfigExplanation

__all__ = ["COMMON", "explanation"]


def explanation(run: R, rules: Iterable[Rule[R]], version_from: str, length: float | None) -> ConfigExplanation:
    """Put together what there is to say about a run.

    Args:
        run: the run.
        rules: the rules of its host; those of all hosts are added.
        version_from: where the assumed version comes from.
        length: mean number of tokens of a response; None if it is not known.
    """
    run.look_through_observe()
    every: list[Rule[R]] = [*rules, *COMMON]
    without_effect = ignored(every, run)
    relevant = [setting for setting in run.settings if setting.key in run.defaults or setting.key in run.kl_keys]
    return ConfigExplanation(
        host=run.host.name,
        version=str(run.version),
        version_from=version_from,
        algorithm=run.algorithm,
        settings=tuple(run.shown(setting.key) for setting in relevant),
        statements=dict(statements(run, without_effect)),
        findings=findings(every, run),
        suggestions=tuple(suggestions(run, length)),
    )
