"""What a TRL config optimises: the reading of YAML, arguments and Python, and the KL terms that follow from them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.explained import explanation
from kl_plugins.adapters.explained.run import ConfiguredRun, Staleness, Term
from kl_plugins.adapters.trl import FIELD, HOST, SCRIPTS
from kl_plugins.adapters.trl.config import PROCESSED, behaviour_source, mode_in, reward_site, sampling_of
from kl_plugins.adapters.trl.explained import defaults
from kl_plugins.adapters.trl.refusals import contradictions
from kl_plugins.explain.config import ConfigExplanation
from kl_plugins.sampling import Sampling
from kl_plugins.settings import Format, Settings, Unknown, read_words
from kl_plugins.spec import KLSpec

FORMAT = Format(
    program=r"\btrl\s+(grpo|rloo)\b|trl\.scripts\.\w+|\w*(grpo|rloo|gspo)\w*\.py\b",
    calls=("GRPOConfig", "RLOOConfig", "AsyncGRPOConfig", "GMPOConfig", "GRPOTrainer", "RLOOTrainer", "GMPOTrainer"),
    config_flags=("config",),
)
"""TRL's programs, and the classes whose arguments are settings."""

RLOO_ONLY = ("normalize_advantages", "reward_clip_range")
"""Settings that RLOOConfig has and GRPOConfig does not."""


class TRLRun(ConfiguredRun):
    """A run of TRL's GRPO or RLOO; see :class:`~kl_plugins.adapters.explained.run.ConfiguredRun`."""

    @cached_property
    def algorithm(self) -> str:
        """``GRPO``, ``RLOO``, ``GMPO``, ``AsyncGRPO``, or the name of another script of TRL's command line."""
        words = " ".join([*self.settings.words, *self.settings.calls])
        if "AsyncGRPO" in words or "async_grpo" in words:
            return "AsyncGRPO"
        if "gmpo" in words.lower():
            return "GMPO"
        script = re.search(r"\btrl (\w+)", words)
        if script is not None and script[1] not in SCRIPTS:
            return script[1]
        rloo = "rloo" in words.lower() or any(self.given(key) for key in RLOO_ONLY)
        return "RLOO" if rloo else "GRPO"

    @property
    def spec_keys(self) -> tuple[str, ...]:
        """The ``kl`` field."""
        return (FIELD,)

    def unobservable(self, key: str) -> Iterator[str]:
        """Give the reasons why TRL's KL cannot be observed."""
        if self.value(key) is not None:
            yield f"TRL has no setting for the estimator of its own KL; leave {self.value(key)!r} out"
            self.settings.add(key, None, "kl-plugins")
        if self.number("beta") == 0:
            yield "beta is 0, so TRL loads no reference model and computes no KL; set beta to a very small number"
        if self.observes_exact(key) and self.algorithm == "RLOO":
            yield "exact terms are observed in GRPO alone, because RLOO puts its KL into the reward"

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """TRL's defaults for the algorithm and the version."""
        return defaults.defaults(self.algorithm, self.version)

    @property
    def kl_keys(self) -> frozenset[str]:
        """TRL's settings whose names contain ``kl``."""
        return defaults.KL_KEYS

    @property
    def sampling_keys(self) -> tuple[str, ...]:
        """TRL's settings of generation."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return (*names, *(f"generation_kwargs.{name}" for name in names))

    @cached_property
    def config(self) -> Any:
        """The settings and defaults with the attributes of a GRPOConfig or RLOOConfig."""
        found: dict[str, Any] = {key: self.value(key) for key in self.defaults}
        for key in ("temperature", "top_p", "top_k", "beta", "top_entropy_quantile", "repetition_penalty"):
            if key in found:
                found[key] = self.number(key)
        for key in ("min_p", "off_policy_mask_threshold"):
            found[key] = self.optional(key)
        steps = self.optional("steps_per_generation") or self.whole("gradient_accumulation_steps")
        found |= {
            "steps_per_generation": max(int(steps), 1),
            "gradient_accumulation_steps": self.whole("gradient_accumulation_steps"),
            "num_iterations": self.whole("num_iterations"),
            "generation_kwargs": {
                setting.key.split(".", 1)[1]: setting.value
                for setting in self.settings
                if setting.key.startswith("generation_kwargs.") and not isinstance(setting.value, Unknown)
            },
        }
        if isinstance(found.get("scale_rewards"), bool):
            found["scale_rewards"] = "group" if found["scale_rewards"] else "none"
        for key in ("use_vllm", "use_liger_kernel", "normalize_advantages"):
            if key in found:
                found[key] = self.flag(key)
        return SimpleNamespace(**found)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """TRL's own KL term, or that of the ``kl`` field; none where beta is 0."""
        written = self.value(FIELD)
        if self.algorithm not in ("GRPO", "RLOO", "GMPO"):
            return ()
        if written is not None:
            return tuple(self._spec_term(str(written)))
        if self.number("beta") == 0:
            return ()
        return (self._rloo_term() if self.algorithm == "RLOO" else self._grpo_term(),)

    @property
    def reweights(self) -> bool:
        """Whether TRL multiplies k3 by the live ratio of policy and old policy."""
        return self.algorithm == "GRPO" and self.flag("use_bias_correction_kl")

    @property
    def by_sequence(self) -> bool:
        """Whether that ratio is one number per sequence."""
        return self.reweights and self.text("importance_sampling_level") == "sequence"

    @cached_property
    def ratio(self) -> str:
        """The policy that weights against the behaviour policy divide by: ``sampler``, ``old`` or ``current``."""
        if self.staleness.updates is None:
            return "old"
        return behaviour_source(KLSpec.parse("k2@loss/is:token/behaviour:old"), self.config, self.flag("use_vllm"))

    def _grpo_term(self) -> Term:
        old = (
            "each token's KL is multiplied by policy / old policy, with TRL's own log-probs of the rollout"
            if self.ratio == "old"
            else "each token's KL is multiplied by policy / old policy. Each rollout serves one optimizer step, so the "
            "ratio is 1; its gradient still turns the coefficient of k3 into that of k2"
        )
        weighted = Term(
            spec=KLSpec.parse("k2@loss/is:token/behaviour:old"),
            written="k3 times the live ratio policy / old policy (use_bias_correction_kl)",
            keys=("use_bias_correction_kl",),
            beta_key="beta",
            beta=self.number("beta"),
            weight=f"{old}. The ratio is not clipped, and vLLM's importance weight does not reach it",
            rule=defaults.RULES.get(self.text("loss_type")),
            rule_setting=f"loss_type {self.text('loss_type')}",
            rule_key="loss_type",
        )
        if self.algorithm == "GMPO":
            weighted = replace(weighted, keys=("beta",), rule="response", rule_setting="GMPO", rule_key="")
        if not self.reweights:
            return replace(
                weighted,
                spec=KLSpec.parse("k3@loss"),
                written="k3 of every token, without a weight",
                weight="none: each token's KL counts as it is, whichever policy drew the token",
            )
        if self.by_sequence:
            return replace(
                weighted,
                spec=KLSpec.parse("k3@loss/is:token/behaviour:old"),
                equal=False,
                written="k3 times one live ratio per sequence (use_bias_correction_kl with the sequence level)",
                keys=("use_bias_correction_kl", "importance_sampling_level"),
                weight="the geometric mean of the token ratios of a response multiplies the KL of each of its tokens",
            )
        return weighted

    def _rloo_term(self) -> Term:
        return Term(
            spec=KLSpec.parse("k1@reward"),
            written="k1, summed over the response",
            keys=("beta",),
            beta_key="beta",
            beta=self.number("beta"),
            weight="none of its own: the KL is part of the reward, and the ratio of the policy loss multiplies it",
            rule=None,
            rule_setting="",
            site=reward_site("RLOO", self.config),
        )

    def _spec_term(self, written: str) -> Iterator[Term]:
        spec = self.spec_in(FIELD)
        if spec is None:
            return
        # Exact terms ask transformers for ZeRO-3; everything else depends on the placement alone.
        twin = KLSpec.parse(f"k1@{spec.placement}" if spec.placement != "loss" else "k2@loss")
        asked = twin if spec.needs_exact else spec
        problems = list(contradictions(asked, self.config, self.algorithm, self.version))
        if self.algorithm == "GMPO":
            problems.append("GMPO has a loss of its own, which kl-plugins does not know; use GRPO")
        source = behaviour_source(spec, self.config, self.flag("use_vllm"))
        self.problems += [(FIELD, problem) for problem in [*problems, *self.sampling.problems(spec, source)]]
        against = {
            "unused": "none",
            "sampler": "policy / sampler, with the log-probs of vLLM",
            "old": "policy / old policy, with TRL's own log-probs of the rollout",
            "current": "1: each rollout serves one optimizer step, so TRL keeps no old log-probs",
        }[source]
        mode = self.text("loss_type")
        yield Term(
            spec=spec,
            written=f"{FIELD}={written}",
            keys=(FIELD,),
            beta_key="beta",
            beta=self.number("beta"),
            weight=against,
            rule=defaults.RULES.get(mode) if spec.placement == "loss" else None,
            rule_setting=f"loss_type {mode}",
            rule_key="loss_type",
            native=False,
            site=reward_site(self.algorithm, self.config) if spec.placement == "reward" else "",
        )

    @cached_property
    def sampling(self) -> Sampling:
        """How completions are sampled; a server that does not say its mode is taken to report processed log-probs."""
        return sampling_of(self.config, mode_in(self.config, False, self.version) or PROCESSED)

    @cached_property
    def staleness(self) -> Staleness:
        """TRL's optimizer steps per rollout."""
        config = self.config
        updates = config.steps_per_generation * config.num_iterations / config.gradient_accumulation_steps
        served = f"each rollout serves {updates:g} optimizer step{'s' * (updates != 1)}"
        if updates < 1:
            served = f"each optimizer step uses {1 / updates:g} rollouts"
        text = (
            f"{served} (num_iterations "
            f"{config.num_iterations}, steps_per_generation {config.steps_per_generation}, "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps})"
        )
        if self.algorithm == "AsyncGRPO":
            return Staleness(updates, "AsyncGRPO generates while it trains", asynchronous=True, engine=True)
        if self.given("generation_batch_size") and not self.given("steps_per_generation"):
            return Staleness(None, "generation_batch_size decides it together with the number of processes")
        return Staleness(updates, text, engine=self.flag("use_vllm"))

    @property
    def reference(self) -> str:
        """TRL's reference model."""
        if self.flag("use_peft") or "peft_config" in self.settings:
            return "the base model with the adapter switched off; a second model is not loaded"
        if self.flag("sync_ref_model"):
            alpha, steps = self.number("ref_model_mixup_alpha"), self.number("ref_model_sync_steps")
            return f"a copy that moves: every {steps:g} steps it becomes {alpha:g} policy + {1 - alpha:g} itself"
        return "the model that training starts from, loaded a second time; it does not change"

    @property
    def length_limit(self) -> float | None:
        """TRL's ``max_completion_length``."""
        return self.number("max_completion_length") or None

    def paste(self, spec: str, beta: float, placement: str) -> tuple[str, ...]:
        """Return lines of YAML."""
        return (f"{FIELD}: {spec}", f"beta: {beta:g}")


def normalised(settings: Settings) -> Settings:
    """Return the settings under TRL's own names: flags may be written with dashes, and ``--no_x`` means False.

    Args:
        settings: what was read.
    """
    found = settings.renamed({setting.key: setting.key.replace("-", "_") for setting in settings})
    for setting in list(found):
        name = setting.key.removeprefix("no_")
        if name != setting.key and setting.value is True and isinstance(defaults.GRPO.get(name), bool):
            found.add(name, False, setting.place)
    return found


def explain_config(
    words: Sequence[str], version: str, version_from: str, length: float | None = None
) -> ConfigExplanation:
    """Explain a TRL config; see :class:`~kl_plugins.explain.config.ConfigExplainer`.

    Args:
        words: YAML files, scripts, arguments of ``trl grpo`` or ``trl rloo``, Python calls.
        version: the version of TRL to assume.
        version_from: where the version comes from, in words.
        length: mean number of tokens of a response; None if it is not known.
    """
    from kl_plugins.adapters.trl.explained.rules import RULES

    run = TRLRun(HOST, Version(version), normalised(read_words(words, FORMAT)))
    return explanation(run, RULES, version_from, length)
