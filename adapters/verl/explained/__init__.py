"""What a veRL config optimises: Hydra overrides, a resolved config or a script, and the KL terms that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.aggregations import Rule
from kl_plugins.adapters.explained import explanation
from kl_plugins.adapters.explained.run import ConfiguredRun, Staleness, Term, Tree
from kl_plugins.adapters.verl import HOST, LOSS_BETA, LOSS_KEY, SCORE_BETA, SCORE_KEY
from kl_plugins.adapters.verl.config import Specs, behaviour_source, sampling_of
from kl_plugins.adapters.verl.explained import defaults
from kl_plugins.adapters.verl.explained.defaults import ACTOR, ALGORITHM, ESTIMATORS, MODEL, ROLLOUT, TRAINER
from kl_plugins.adapters.verl.refusals import contradictions, untested
from kl_plugins.explain.config import ConfigExplanation
from kl_plugins.sampling import Sampling
from kl_plugins.settings import Format, Settings, read_words
from kl_plugins.spec import KLSpec, looks_like_spec
from kl_plugins.spec.options import ALLOW_BIASED

FORMAT = Format(program=r"\bmain_ppo\b|\bverl\.|\brecipe[./]|\bmain_\w+", config_flags=())
"""veRL's programs."""

OPTIONAL_NUMBERS = (f"{ROLLOUT}min_p", f"{ROLLOUT}repetition_penalty", f"{ACTOR}loss_scale_factor")
"""Settings that are a number or nothing."""

OWN_CONFIGS = ("ppo_trainer", "ppo_trainer.yaml", "ppo_megatron_trainer", "ppo_megatron_trainer.yaml")
"""veRL's own configs, whose values are the defaults."""

USE_LOSS, USE_REWARD = f"{ACTOR}use_kl_loss", f"{ALGORITHM}use_kl_in_reward"

K3_CLAMP = (
    "veRL clamps the value of k3 to [-10, 10], and a token beyond that has no gradient: it is lost where the reference "
    "is more than 13.6 times as probable as the policy (log-ratio below -2.61), which is where the KL is largest, and "
    "where the log-ratio is above 11"
)


class VerlRun(ConfiguredRun):
    """A run of veRL's PPO trainer; see :class:`~kl_plugins.adapters.explained.run.ConfiguredRun`."""

    @cached_property
    def algorithm(self) -> str:
        """The estimator of advantages."""
        return self.text(f"{ALGORITHM}adv_estimator")

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """veRL's defaults for the version."""
        return defaults.defaults(self.version)

    @property
    def spec_keys(self) -> tuple[str, ...]:
        """The settings of the KL in the loss and of the one in the reward."""
        return LOSS_KEY, SCORE_KEY

    def unobservable(self, key: str) -> Iterator[str]:
        """Give the reasons why veRL's KL cannot be observed."""
        word, switch = self.text(key), USE_LOSS if key == LOSS_KEY else USE_REWARD
        if word.removesuffix("+") not in ESTIMATORS:
            yield f"{word!r} before observe is not one of veRL's estimators; use {', '.join(ESTIMATORS)}"
        if not self.flag(switch):
            yield f"{switch} is False, so veRL computes no such KL; set it to True, with a coefficient of 0 if needed"
        if self.observes_exact(key) and key != LOSS_KEY:
            yield f"exact terms need the policy's logits; put veRL's KL into the loss and observe in {LOSS_KEY}"

    @property
    def kl_keys(self) -> frozenset[str]:
        """veRL's settings whose names contain ``kl``."""
        return defaults.KL_KEYS

    @property
    def sampling_keys(self) -> tuple[str, ...]:
        """veRL's settings of generation."""
        return tuple(f"{ROLLOUT}{name}" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"))

    @property
    def config(self) -> Any:
        """The settings and defaults with the attributes of veRL's config."""
        return Tree(self.flat)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The settings and defaults by key, with the types that veRL's config has."""
        found: dict[str, Any] = {}
        for key in {**self.defaults, **{setting.key: None for setting in self.settings}}:
            found[key] = self.optional(key) if key in OPTIONAL_NUMBERS else self.typed(key)
        return found

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The KL in the loss, and the one in the reward, where they are switched on; specs also where they are not."""
        return (*self._loss_terms(), *self._score_terms())

    def _loss_terms(self) -> Iterator[Term]:
        written = self.text(LOSS_KEY)
        rule, setting = self.rule
        shared: dict[str, Any] = {
            "keys": (LOSS_KEY, USE_LOSS),
            "beta_key": LOSS_BETA,
            "beta": self.number(LOSS_BETA),
            "rule": rule,
            "rule_setting": setting,
            "rule_key": f"{ACTOR}loss_agg_mode",
        }
        if looks_like_spec(written):
            spec = self._checked(LOSS_KEY)
            if spec is not None and self.flag(USE_LOSS):
                sources = {
                    "unused": "none",
                    "sampler": "policy / sampler, with the log-probs of the rollout engine",
                    "old": "policy / old policy, with the log-probs that veRL recomputes",
                }
                weight = sources[behaviour_source(spec, self.config)]
                yield Term(spec=spec, written=f"kl_loss_type={written}", weight=weight, native=False, **shared)
            return
        base = written.removesuffix("+")
        if not self.flag(USE_LOSS) or base not in ESTIMATORS or self.number(LOSS_BETA) == 0:
            return
        straight = written.endswith("+")
        name = "k2" if straight else ESTIMATORS[base]
        yield Term(
            spec=KLSpec.parse("k1@loss/" + ALLOW_BIASED if name == "k1" else f"{name}@loss"),
            written=f"kl_loss_type={written}: the value of {ESTIMATORS[base]} with the gradient of k2"
            if straight
            else f"kl_loss_type={written}: {ESTIMATORS[base]} of every token",
            weight="none: veRL's KL loss gets the log-probs of policy and reference alone, and no rollout weight",
            clamp=K3_CLAMP if name == "k3" else "",
            **shared,
        )

    def _score_terms(self) -> Iterator[Term]:
        written = self.text(SCORE_KEY)
        shared: dict[str, Any] = {
            "keys": (SCORE_KEY, USE_REWARD),
            "beta_key": SCORE_BETA,
            "beta": self.number(SCORE_BETA),
            "weight": "none of its own: the ratio of the policy loss multiplies the advantages, and the KL in them",
            "rule": None,
            "rule_setting": "",
        }
        if looks_like_spec(written):
            spec = self._checked(SCORE_KEY)
            if spec is not None and self.flag(USE_REWARD):
                site = self.reward_site if spec.placement == "reward" else ""
                yield Term(spec=spec, written=f"kl_penalty={written}", native=False, site=site, **shared)
            return
        base = written.removesuffix("+")
        if self.flag(USE_REWARD) and base in ESTIMATORS and self.number(SCORE_BETA) != 0:
            name = ESTIMATORS[base]
            yield Term(
                spec=KLSpec.parse("k1@reward" if name == "k1" else f"{name}@reward/{ALLOW_BIASED}"),
                written=f"kl_penalty={written}: {name}",
                clamp="the value of k3 is clamped to at most 10 nats per token" if name == "k3" else "",
                site=self.reward_site,
                **shared,
            )

    def _checked(self, key: str) -> KLSpec | None:
        """Return the spec in a key, after a check of everything that refuses it and can be seen in a config."""
        spec = self.spec_in(key)
        if spec is None:
            return None
        home = LOSS_KEY if spec.placement == "loss" else SCORE_KEY
        if key != home:
            self.problems.append((key, f"a @{spec.placement} spec cannot work here; put it into {home}"))
            return None
        specs = Specs(spec, None) if spec.placement == "loss" else Specs(None, spec)
        # Refusals read the texts again, so each key gets one that is valid.
        texts = {LOSS_KEY: self.defaults[LOSS_KEY], SCORE_KEY: self.defaults[SCORE_KEY], key: str(spec)}
        config = Tree({**self.flat, **texts})
        self.problems += [(key, problem) for _, _, problem in contradictions(specs, config)]
        self.problems += [(key, f"{problem} (KL_PLUGINS_ALLOW_UNTESTED=1 allows it)") for problem in untested(config)]
        return spec

    @property
    def rule(self) -> tuple[Rule | None, str]:
        """The rule of veRL's aggregation, and the setting that selects it."""
        mode = self.text(f"{ACTOR}loss_agg_mode")
        setting = f"loss_agg_mode {mode}"
        if mode == "seq-mean-token-sum-norm" and self.optional(f"{ACTOR}loss_scale_factor") is not None:
            return "constant", f"{setting}, loss_scale_factor {self.number(f'{ACTOR}loss_scale_factor'):g}"
        return defaults.RULES.get(mode), setting

    @property
    def reward_site(self) -> str:
        """What veRL makes of a KL in the reward."""
        if self.algorithm in ("grpo", "grpo_vectorized"):
            divided = self.flag(f"{ALGORITHM}norm_adv_by_std_in_grpo")
            after = ", then the result is divided by the group's standard deviation" if divided else ""
            return f"the KL of a response is summed into its reward, the group's mean is subtracted{after}"
        return f"token rewards - beta * k_t, and then the advantages of {self.algorithm}"

    @cached_property
    def sampling(self) -> Sampling:
        """How responses are sampled for training."""
        return sampling_of(self.config)

    @cached_property
    def staleness(self) -> Staleness:
        """veRL's optimizer steps per rollout batch."""
        batch, mini = self.whole("data.train_batch_size"), self.whole(f"{ACTOR}ppo_mini_batch_size")
        epochs = self.whole(f"{ACTOR}ppo_epochs")
        updates = epochs * max(batch / mini, 1)
        words = " ".join(self.settings.words)
        mode = self.text(f"{TRAINER}v1.trainer_mode")
        for name in ("fully_async", "one_step_off", "separate_async", "colocate_async"):
            if name in words or (mode == name and self.flag(f"{TRAINER}use_v1")):
                text = f"{name} generates rollouts while the policy is trained"
                return Staleness(updates, text, asynchronous=True, engine=True)
        text = (
            f"each rollout batch serves {updates:g} optimizer step{'s' * (updates != 1)} (data.train_batch_size "
            f"{batch:g} / ppo_mini_batch_size {mini:g} x ppo_epochs {epochs:g})"
        )
        return Staleness(updates, text, engine=True)

    @property
    def reference(self) -> str:
        """veRL's reference policy."""
        if self.number(f"{MODEL}lora_rank") > 0 or self.text(f"{MODEL}lora_adapter_path"):
            return "the base model with the adapter switched off"
        return "the model that training starts from; it does not change"

    @property
    def length_limit(self) -> float | None:
        """The constant of ``seq-mean-token-sum-norm``, by default the length limit of responses."""
        factor = self.number(f"{ACTOR}loss_scale_factor")
        return factor or self.number("data.max_response_length") or None

    def paste(self, spec: str, beta: float, placement: str) -> tuple[str, ...]:
        """Return Hydra overrides."""
        if placement == "loss":
            sampler = (f"{ROLLOUT}calculate_log_probs=True",) if "behaviour:sampler" in spec else ()
            return f"{USE_LOSS}=True", f"{LOSS_KEY}={spec}", f"{LOSS_BETA}={beta:g}", *sampler
        return f"{USE_REWARD}=True", f"{SCORE_KEY}={spec}", f"{SCORE_BETA}={beta:g}"


def with_hydra_config(settings: Settings) -> Settings:
    """Return settings with those of the config that ``--config-name`` selects below them, if that file is there.

    Args:
        settings: what was read of a command line.
    """
    name = settings.get("config-name")
    if name is None or name.value in OWN_CONFIGS:
        return settings
    folder = settings.get("config-path")
    file = Path(str(folder.value) if folder is not None else "") / f"{str(name.value).removesuffix('.yaml')}.yaml"
    if not file.is_file():
        settings.notes.append(
            f"--config-name selects {name.value}, which was not found, so its settings are unknown; give the resolved "
            "config of the run (.hydra/config.yaml)"
        )
        return settings
    whole = read_words([str(file)], FORMAT)
    whole.update(settings)
    return whole


def explain_config(
    words: Sequence[str], version: str, version_from: str, length: float | None = None
) -> ConfigExplanation:
    """Explain a veRL config; see :class:`~kl_plugins.explain.config.ConfigExplainer`.

    Args:
        words: overrides, a resolved YAML config, a list of overrides in YAML, shell scripts.
        version: the version of veRL to assume.
        version_from: where the version comes from, in words.
        length: mean number of tokens of a response; None if it is not known.
    """
    from kl_plugins.adapters.verl.explained.rules import RULES

    run = VerlRun(HOST, Version(version), with_hydra_config(read_words(words, FORMAT)))
    return explanation(run, RULES, version_from, length)
