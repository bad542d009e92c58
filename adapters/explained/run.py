"""A run as its config describes it: settings with defaults, and the KL terms that follow from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.aggregations import RULES, Rule
from kl_plugins.aggregation import Aggregation
from kl_plugins.hosts import Host
from kl_plugins.sampling import Sampling
from kl_plugins.settings import Setting, Settings, Unknown
from kl_plugins.spec import KLSpec, KLSpecError
from kl_plugins.spec.observation import Observation, looks_like_observation
from kl_plugins.spec.options import ALLOW_BIASED

RESOLVED = 150
"""A config with more settings than this is taken to be a resolved one, which contains the defaults as well."""


@dataclass(frozen=True)
class Term:
    """A KL term of a run.

    Attributes:
        spec: the spec that the user wrote, or the one whose gradient the host's own setting has.
        written: what the user wrote, or the host's words for its own setting.
        keys: the settings that select it.
        beta_key: the setting that holds beta.
        beta: beta.
        weight: against which policy the term is weighted, in words.
        rule: how much each token counts; None for a KL in the reward.
        rule_setting: the setting that selects the rule, with its value.
        rule_key: the key of that setting; empty if the host has none.
        native: whether it is the host's own, and not a spec of kl-plugins.
        equal: whether the gradient is that of ``spec``; otherwise ``spec`` is only the nearest one.
        clamp: where the host's clamps take the gradient away, in words; empty if there are none.
        site: what the host does with a KL in the reward; empty for a loss.
    """

    spec: KLSpec
    written: str
    keys: tuple[str, ...]
    beta_key: str
    beta: float
    weight: str
    rule: Rule | None
    rule_setting: str
    rule_key: str = ""
    native: bool = True
    equal: bool = True
    clamp: str = ""
    site: str = ""

    @property
    def aggregation(self) -> Aggregation | None:
        """How the host aggregates the term; None for a KL in the reward."""
        return None if self.rule is None else Aggregation(RULES[self.rule].kind, self.rule_setting)

    @property
    def in_loss(self) -> bool:
        """Whether the term stands beside the policy loss."""
        return self.spec.placement == "loss"


@dataclass(frozen=True)
class Staleness:
    """How far the policy is ahead of the data.

    Attributes:
        updates: optimizer steps per rollout; None if the settings do not say it.
        text: the settings behind it, in words.
        asynchronous: whether rollouts are generated while the policy is trained.
        engine: whether another program than the trainer generates the responses.
    """

    updates: float | None
    text: str
    asynchronous: bool = False
    engine: bool = False

    @property
    def stale(self) -> bool:
        """Whether some updates use data that an older policy drew."""
        return self.asynchronous or (self.updates is not None and self.updates > 1)


class ConfiguredRun(ABC):
    """A run as the settings of a config describe it. No host is imported.

    Args:
        host: the descriptor of the host.
        version: the version of the host that is assumed.
        settings: what was read.
    """

    def __init__(self, host: Host, version: Version, settings: Settings) -> None:
        self.host = host
        self.version = version
        self.settings = settings
        self.problems: list[tuple[str, str]] = []
        """Specs that cannot be read or used: the key, and what is wrong."""
        self.observed: dict[str, tuple[Setting, Observation]] = {}
        """Settings with ``observe``, by key; :attr:`settings` then holds what the host trains with."""

    # What each host fills in.

    @property
    @abstractmethod
    def defaults(self) -> Mapping[str, Any]:
        """The host's defaults of all settings that matter here, for the assumed version."""

    @property
    @abstractmethod
    def kl_keys(self) -> frozenset[str]:
        """All settings of the host whose name contains ``kl``."""

    @property
    @abstractmethod
    def sampling_keys(self) -> tuple[str, ...]:
        """The settings that decide how responses are sampled for training."""

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """The trainer or estimator of advantages."""

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The KL terms that the run trains with."""

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """How responses are sampled for training."""

    @property
    @abstractmethod
    def staleness(self) -> Staleness:
        """How far the policy is ahead of the data."""

    @property
    @abstractmethod
    def reference(self) -> str:
        """Which policy is the reference, and whether it changes."""

    @property
    @abstractmethod
    def length_limit(self) -> float | None:
        """The largest number of tokens of a response; None if the settings do not say it."""

    @abstractmethod
    def paste(self, spec: str, beta: float, placement: str) -> tuple[str, ...]:
        """Return the lines that select a spec and a beta, in the host's own form."""

    @property
    def spec_keys(self) -> tuple[str, ...]:
        """The settings that can hold a spec or ``observe``."""
        return ()

    def unobservable(self, key: str) -> Iterator[str]:
        """Give the reasons why the KL of a setting cannot be observed, as far as a config shows them.

        Args:
            key: a setting with ``observe``.
        """
        yield from ()

    # What all hosts have in common.

    def observes_exact(self, key: str) -> bool:
        """Return whether a setting asks to observe a spec with exact terms.

        Args:
            key: a setting with ``observe``.
        """
        _, observation = self.observed.get(key, (None, None))
        return observation is not None and observation.spec is not None and observation.spec.needs_exact

    def look_through_observe(self) -> None:
        """Put what the host trains with in the place of each setting with ``observe``, and keep the observation."""
        for key in self.spec_keys:
            setting = self.settings.get(key)
            if setting is None or not looks_like_observation(setting.value):
                continue
            native = None
            try:
                observation = Observation.parse(setting.value)
            except KLSpecError as error:
                self.problems.append((key, f"it is not a valid text with observe: {error.problem}"))
            else:
                native = observation.native
                self.observed[key] = (setting, observation)
            self.settings.add(key, self.defaults.get(key) if native is None else native, setting.place)
            self.problems += [(key, problem) for problem in self.unobservable(key)]

    @cached_property
    def name(self) -> str:
        """The host and its version."""
        return f"{self.host.title} {self.version}"

    def given(self, key: str) -> bool:
        """Whether the config sets a key."""
        return key in self.settings

    def chosen(self, key: str) -> bool:
        """Whether somebody chose a value: it is given, and is not merely one of the defaults in a resolved config."""
        resolved = len(self.settings) > RESOLVED
        return self.given(key) and not (resolved and self.value(key) == self.defaults.get(key))

    def value(self, key: str) -> Any:
        """Return the value of a setting, or the host's default if it is not given or not known."""
        found = self.settings.get(key)
        if found is None or isinstance(found.value, Unknown):
            return self.defaults.get(key)
        return found.value

    def number(self, key: str) -> float:
        """Return a setting as a number; the host's default if it is none, and 0 if there is no default."""
        for value in (self.value(key), self.defaults.get(key)):
            number = as_number(value)
            if number is not None:
                return number
        return 0.0

    def whole(self, key: str) -> int:
        """Return a setting as a whole number of at least 1."""
        return max(int(self.number(key)), 1)

    def optional(self, key: str) -> float | None:
        """Return a setting as a number, or None if it is none."""
        return as_number(self.value(key))

    def text(self, key: str) -> str:
        """Return a setting as text; empty if it is None."""
        value = self.value(key)
        return "" if value is None else str(value)

    def flag(self, key: str) -> bool:
        """Return a setting as a truth value."""
        value = self.value(key)
        return (
            value.lower() not in ("", "false", "0", "no", "none", "off", "n") if isinstance(value, str) else bool(value)
        )

    def typed(self, key: str) -> Any:
        """Return a setting in the type of the host's default; as it is given if the default is no number."""
        assumed = self.defaults.get(key)
        if isinstance(assumed, bool):
            return self.flag(key)
        return self.number(key) if isinstance(assumed, (int, float)) else self.value(key)

    def spec_in(self, key: str) -> KLSpec | None:
        """Return the spec that a setting holds, or None if it is not a valid one; what is wrong becomes a finding.

        A spec that would need ``allow:biased`` is explained as if it had it.

        Args:
            key: the setting.
        """
        written = self.text(key)
        try:
            return KLSpec.parse(written)
        except KLSpecError as error:
            try:
                spec = KLSpec.parse(f"{written}/{ALLOW_BIASED}")
            except KLSpecError:
                self.problems.append((key, f"it is not a valid spec: {error.problem}"))
                return None
        self.problems.append((key, f"its gradient is that of no divergence; add /{ALLOW_BIASED} to run it"))
        return spec

    def shown(self, key: str) -> str:
        """Return a setting with its value and the place where it was found."""
        found = self.observed[key][0] if key in self.observed else self.settings.get(key)
        if found is not None:
            return str(found)
        return f"{key}={self.defaults.get(key)} (default of {self.name})"


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Return the settings of a run that is being set up, in the form in which a config's settings are read.

    Args:
        values: values by the host's own dotted keys.
    """
    found = Settings()
    for key, value in values.items():
        found.add(key, value, "the run")
    return found


class Tree(Mapping[str, Any]):
    """Nested settings with the attributes and the ``get`` of a config object; what is missing is an empty tree.

    Args:
        flat: values by dotted key.
    """

    def __init__(self, flat: Mapping[str, Any]) -> None:
        self._entries: dict[str, Any] = {}
        groups: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            head, _, rest = key.partition(".")
            if rest:
                groups.setdefault(head, {})[rest] = value
            else:
                self._entries[head] = value
        self._entries |= {head: Tree(entries) for head, entries in groups.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._entries.get(name, _EMPTY)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


_EMPTY = Tree({})


def as_number(value: Any) -> float | None:
    """Return a value as a finite number, or None if it is none.

    Args:
        value: the value of a setting.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None
