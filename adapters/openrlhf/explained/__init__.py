"""What an OpenRLHF command line optimises: the flags, and the KL term that follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.aggregations import Rule
from kl_plugins.adapters.explained import explanation
from kl_plugins.adapters.explained.run import ConfiguredRun, Staleness, Term
from kl_plugins.adapters.openrlhf import COEFFICIENT_FLAG, ESTIMATOR_FLAG, HOST, LOSS_FLAG
from kl_plugins.adapters.openrlhf.config import (
    GLOBAL_MEAN_SINCE,
    behaviour_source,
    corrects_policy_loss,
    reward_site,
    sampling_of,
)
from kl_plugins.adapters.openrlhf.explained import defaults
from kl_plugins.adapters.openrlhf.explained.defaults import ADVANTAGE, FLAT, KL
from kl_plugins.adapters.openrlhf.refusals import contradictions
from kl_plugins.explain.config import ConfigExplanation
from kl_plugins.sampling import Sampling
from kl_plugins.settings import Format, Settings, read_words
from kl_plugins.spec import KLSpec, looks_like_spec
from kl_plugins.spec.options import ALLOW_BIASED

FORMAT = Format(program=r"openrlhf\.cli\.|train_ppo_ray\b")
"""OpenRLHF's programs."""

ESTIMATOR, USE_LOSS, COEFFICIENT = f"{KL}estimator", f"{KL}use_loss", f"{KL}init_coef"

CLAMPS = {
    "k1": "OpenRLHF clamps the value to [-10, 10]; a log-ratio beyond that has no gradient",
    "k2": (
        "OpenRLHF clamps the value of k2 to at most 10, so a token whose log-ratio is above 4.47 or below -4.47 has no "
        "gradient, which is where the policy is farthest from the reference"
    ),
    "k3": (
        "OpenRLHF clamps the value of k3 to at most 10, so a token has no gradient where the reference is more than "
        "13.6 times as probable as the policy (log-ratio below -2.61), which is where the KL is largest, and where the "
        "log-ratio is above 11"
    ),
}
"""Where the clamp takes the gradient of a loss away, by estimator."""


class OpenRLHFRun(ConfiguredRun):
    """A run of OpenRLHF's PPO trainer; see :class:`~kl_plugins.adapters.explained.run.ConfiguredRun`.

    Attributes:
        flat: flags that were given by the flat names of older versions.
    """

    flat: tuple[str, ...] = ()

    @cached_property
    def algorithm(self) -> str:
        """The estimator of advantages."""
        return self.text(f"{ADVANTAGE}estimator")

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """OpenRLHF's defaults for the version."""
        return defaults.defaults(self.version)

    @property
    def spec_keys(self) -> tuple[str, ...]:
        """The estimator."""
        return (ESTIMATOR,)

    def unobservable(self, key: str) -> Iterator[str]:
        """Give the reasons why OpenRLHF's KL cannot be observed."""
        if self.text(key) not in CLAMPS:
            yield f"{self.text(key)!r} before observe is not one of OpenRLHF's estimators; use {', '.join(CLAMPS)}"
        if self.number(COEFFICIENT) == 0:
            yield "the coefficient is 0, so OpenRLHF loads no reference model; set it to a very small number"
        if self.observes_exact(key) and not self.flag(USE_LOSS):
            yield "exact terms need logits, which OpenRLHF has only while it trains; add --algo.kl.use_loss"

    @property
    def kl_keys(self) -> frozenset[str]:
        """OpenRLHF's flags about the KL."""
        return defaults.KL_KEYS

    @property
    def sampling_keys(self) -> tuple[str, ...]:
        """OpenRLHF's flags of generation."""
        return "rollout.temperature", "rollout.top_p"

    @cached_property
    def args(self) -> Any:
        """The flags and defaults as OpenRLHF's nested arguments."""
        root: dict[str, Any] = {}
        for key in self.defaults:
            *groups, name = key.split(".")
            place = root
            for group in groups:
                place = place.setdefault(group, {})
            place[name] = self.typed(key)
        return _namespace(root)

    @property
    def as_loss(self) -> bool:
        """Whether the KL is in the loss and not in the reward."""
        return self.flag(USE_LOSS)

    @property
    def unbiased(self) -> bool:
        """Whether ``--algo.kl.unbiased_gradient`` has an effect."""
        return self.as_loss and self.flag(f"{KL}unbiased_gradient")

    @property
    def corrects(self) -> bool:
        """Whether OpenRLHF's importance sampling multiplies the policy loss."""
        return corrects_policy_loss(self.args)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The KL term; none where the coefficient is 0."""
        written = self.text(ESTIMATOR)
        if looks_like_spec(written):
            term = self._spec_term(written)
            return () if term is None else (term,)
        if self.number(COEFFICIENT) == 0 or written not in CLAMPS:
            return ()
        return (self._loss_term(written) if self.as_loss else self._score_term(written),)

    @property
    def rule(self) -> tuple[Rule, str]:
        """The rule of OpenRLHF's KL loss."""
        if self.version < GLOBAL_MEAN_SINCE:
            return "micro-batch", f"OpenRLHF's KL loss before {GLOBAL_MEAN_SINCE}"
        return "batch", "OpenRLHF's KL loss, whatever --actor.loss_agg_mode and --actor.policy_loss_type say"

    def _loss_term(self, written: str) -> Term:
        rule, setting = self.rule
        shared: dict[str, Any] = {
            "keys": (ESTIMATOR, USE_LOSS),
            "beta_key": COEFFICIENT,
            "beta": self.number(COEFFICIENT),
            "rule": rule,
            "rule_setting": setting,
        }
        if self.unbiased:
            shared["keys"] = (ESTIMATOR, f"{KL}unbiased_gradient")
            return Term(
                spec=KLSpec.parse("k2@loss/is:token/cap:10/behaviour:old"),
                written=f"the value of {written} with the gradient of k2, weighted (unbiased_gradient)",
                weight="policy / old policy of each token, at most 10 and detached. The old log-probs are those that "
                "the trainer recomputes, and not those of vLLM",
                **shared,
            )
        return Term(
            spec=KLSpec.parse(f"{written}@loss" + (f"/{ALLOW_BIASED}" if written == "k1" else "")),
            written=f"{written} of every token",
            weight="none: without unbiased_gradient each token's KL counts as it is, whichever policy drew the token",
            clamp=CLAMPS[written],
            **shared,
        )

    def _score_term(self, written: str) -> Term:
        spec = KLSpec.parse(f"{written}@reward" + (f"/{ALLOW_BIASED}" if written != "k1" else ""))
        return Term(
            spec=spec,
            written=f"{written} of every token",
            keys=(ESTIMATOR, USE_LOSS),
            beta_key=COEFFICIENT,
            beta=self.number(COEFFICIENT),
            weight="none of its own: the ratio of the policy loss multiplies the advantages, and the KL in them",
            rule=None,
            rule_setting="",
            clamp="the value is clamped to [-10, 10] per token",
            site=reward_site(spec, self.args),
        )

    def _spec_term(self, written: str) -> Term | None:
        spec = self.spec_in(ESTIMATOR)
        if spec is None:
            return None
        if (spec.placement == "loss") is not self.as_loss:
            what = f"add {LOSS_FLAG}" if not self.as_loss else f"drop {LOSS_FLAG}"
            self.problems.append((ESTIMATOR, f"a @{spec.placement} spec contradicts {LOSS_FLAG}; {what}"))
            return None
        self.problems += [(ESTIMATOR, problem) for problem in contradictions(spec, self.args)]
        sources = {
            "unused": "none",
            "sampler": "policy / sampler, with the log-probs of vLLM",
            "old": "policy / old policy, with the log-probs that the trainer recomputes",
        }
        rule, setting = self.rule
        loss = spec.placement == "loss"
        return Term(
            spec=spec,
            written=f"{ESTIMATOR_FLAG} {written}",
            keys=(ESTIMATOR, USE_LOSS),
            beta_key=COEFFICIENT,
            beta=self.number(COEFFICIENT),
            weight=sources[behaviour_source(spec, self.args)],
            rule=rule if loss else None,
            rule_setting=setting if loss else "",
            native=False,
            site="" if loss else reward_site(spec, self.args),
        )

    @cached_property
    def sampling(self) -> Sampling:
        """How responses are sampled for training."""
        return sampling_of(self.args)

    @cached_property
    def staleness(self) -> Staleness:
        """OpenRLHF's optimizer steps per rollout batch."""
        samples = self.whole("rollout.batch_size") * self.whole("rollout.n_samples_per_prompt")
        batch, epochs = self.whole("train.batch_size"), self.whole("train.max_epochs")
        updates = epochs * max(samples / batch, 1)
        if self.flag("train.partial_rollout_enable"):
            text = "partial rollouts: one response may hold tokens of several policies"
            return Staleness(updates, text, asynchronous=True, engine=True)
        if self.flag("train.async_enable"):
            return Staleness(updates, "asynchronous training: rollouts lag behind", asynchronous=True, engine=True)
        text = (
            f"each rollout batch serves {updates:g} optimizer step{'s' * (updates != 1)} ({samples:g} responses / "
            f"train.batch_size {batch:g} x max_epochs {epochs:g})"
        )
        return Staleness(updates, text, engine=True)

    @property
    def reference(self) -> str:
        """OpenRLHF's reference policy."""
        return "the model that training starts from, in an actor of its own; it does not change"

    @property
    def length_limit(self) -> float | None:
        """OpenRLHF's limit of new tokens."""
        return self.number("rollout.max_new_tokens") or None

    def paste(self, spec: str, beta: float, placement: str) -> tuple[str, ...]:
        """Return flags for ``kl-plugins run openrlhf.cli.train_ppo_ray``."""
        switch = (LOSS_FLAG,) if placement == "loss" else ()
        return (f"{ESTIMATOR_FLAG} {spec}", *switch, f"{COEFFICIENT_FLAG} {beta:g}")


def _namespace(entries: Mapping[str, Any]) -> SimpleNamespace:
    """Return nested mappings as nested namespaces; a missing attribute stays missing, as in OpenRLHF's arguments."""
    return SimpleNamespace(
        **{key: _namespace(value) if isinstance(value, dict) else value for key, value in entries.items()}
    )


def run_of(settings: Settings, version: Version) -> OpenRLHFRun:
    """Return the run that settings describe. Flat flags of older versions are read by their new names.

    Args:
        settings: what was read.
        version: the version of OpenRLHF to assume.
    """
    flat = tuple(setting.key for setting in settings if setting.key in FLAT)
    run = OpenRLHFRun(HOST, version, settings.renamed(FLAT))
    run.flat = flat
    return run


def explain_config(
    words: Sequence[str], version: str, version_from: str, length: float | None = None
) -> ConfigExplanation:
    """Explain an OpenRLHF command line; see :class:`~kl_plugins.explain.config.ConfigExplainer`.

    Args:
        words: flags, or shell scripts.
        version: the version of OpenRLHF to assume.
        version_from: where the version comes from, in words.
        length: mean number of tokens of a response; None if it is not known.
    """
    from kl_plugins.adapters.openrlhf.explained.rules import RULES

    return explanation(run_of(read_words(words, FORMAT), Version(version)), RULES, version_from, length)
