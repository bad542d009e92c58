"""What TRL's settings say about a spec: its text, the behaviour policy, sampling, aggregation, and the reward site."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.receipts import Statement
from kl_plugins.adapters.trl import FIELD
from kl_plugins.aggregation import Aggregation, Kind
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import numbers_per_token

HELP = (
    "KL spec of kl-plugins, <estimator>@<placement>[/<option>[:<value>]]..., for example k2@loss/is:token, or a preset "
    "such as default. It replaces TRL's own KL term; beta is its coefficient and must not be 0. observe, or "
    "observe:SPEC, measures and changes nothing. null: stock TRL."
)
"""Text of the ``kl`` field for TRL's command line."""

TAKEN = "_kl_plugins_taken"
"""Attribute of a config with a spec that a trainer with hooks has taken over."""

ASSUME_VARIABLE = "KL_PLUGINS_ASSUME_PROCESSED_LOGPROBS"
"""Environment variable: set to 1, an engine whose mode is not known is taken to report processed log-probs."""

ROLLOUT_WITHOUT_VLLM = Version("0.29.1")
"""Before this version, TRL calls ``rollout_func`` only from its vLLM client."""

SERVED_BY_VLLM = Version("1.11")
"""From this version on, the server is vLLM's own, and its command line sets the mode; TRL's server set it itself."""

WITH_KNOWN_HEAD = Version("1.16")
"""From this version on, ``top:`` reads TRL's own fused head; see ``patches/trl/fused_head.py``."""

PROCESSED = "processed_logprobs"
"""vLLM's name for log-probs of the distribution that tokens were drawn from."""

DETACHED_RATIO = ("cispo", "vespo")
"""Loss types of GRPO in which the importance ratio carries no gradient: the log-prob of each token carries its own."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "guidance_scale": (1,),
    "penalty_alpha": (),
    "min_tokens": (0,),
    "min_length": (0,),
    "min_new_tokens": (),
    "num_beams": (1,),
    "do_sample": (True,),
    "logit_bias": ({},),
    "sequence_bias": ({},),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "allowed_token_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "logits_processors": ([],),
    "logits_processor": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "structured_outputs": ({},),
    "guided_decoding": ({},),
    "watermarking_config": (),
}
"""Further settings of vLLM and transformers that change the distribution, with the values (beside None) that do not."""

_KINDS: dict[str, Kind] = {
    "grpo": "sequence mean",
    "sapo": "sequence mean",
    "bnpo": "token mean",
    "dapo": "token mean",
    "cispo": "token mean",
    "vespo": "token mean",
    "dr_grpo": "constant",
    "luspo": "token sum",
}


@dataclass(frozen=True)
class Run:
    """A run of GRPO or RLOO as its settings describe it.

    Attributes:
        algorithm: ``GRPO`` or ``RLOO``.
        config: a GRPOConfig or RLOOConfig.
        arguments: what the trainer is called with, by name; None as long as there is only a config.
        trainer: the class of the trainer, if there is one.
        methods: the hooks in TRL's class, by method name.
    """

    algorithm: str
    config: Any
    arguments: Mapping[str, Any] | None = None
    trainer: type | None = None
    methods: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str | None:
        """The value of the ``kl`` field; None: stock TRL."""
        text: str | None = getattr(self.config, FIELD, None)
        return text

    @property
    def with_engine(self) -> bool:
        """Whether vLLM generates the completions."""
        return bool(getattr(self.config, "use_vllm", False))

    @property
    def own_rollout(self) -> bool:
        """Whether the user's ``rollout_func`` gives the completions and their log-probs."""
        return bool((self.arguments or {}).get("rollout_func"))

    @property
    def sampler_expected(self) -> bool:
        """Whether TRL will hand over the log-probs that completions were sampled with."""
        return self.with_engine or (self.own_rollout and installed() >= ROLLOUT_WITHOUT_VLLM)

    @cached_property
    def mode_of_server(self) -> str | None:
        """The answer of the vLLM server; it is asked once. See :func:`mode_of_server`."""
        return mode_of_server(self.config)


def installed() -> Version:
    """Return the installed version of TRL."""
    return Version(version("trl"))


def is_taken(config: Any) -> bool:
    """Whether a trainer with hooks has been built, or is being built, on this config."""
    return bool(vars(config).get(TAKEN, False))


def statement_of(spec: KLSpec, run: Run) -> Statement:
    """State what a run makes of its spec.

    If the settings do not say which log-probs a vLLM server reports, and a weight divides by them, the server is asked.
    That is a collective if there are several processes.

    Args:
        spec: the run's spec.
        run: the run, with the trainer's arguments.
    """
    source = behaviour_source(spec, run.config, run.sampler_expected)
    mode = mode_in(run.config, run.own_rollout, installed())
    if mode is None and run.with_engine and source == "sampler":
        mode = run.mode_of_server
    return Statement(
        aggregation=aggregation(run.algorithm, run.config),
        behaviour=source,
        sampling=sampling_of(run.config, mode),
        reward_site=reward_site(run.algorithm, run.config) if spec.placement == "reward" else "",
        cost=cost(spec),
    )


def behaviour_source(spec: KLSpec, config: Any, sampler_expected: bool) -> str:
    """Return which log-probs the importance weight divides by: ``sampler``, ``old``, ``current`` or ``unused``.

    ``current`` means that TRL drops the old log-probs because each rollout serves one optimizer step. They then equal
    the policy's own.

    Args:
        spec: the run's spec.
        config: a GRPOConfig or RLOOConfig.
        sampler_expected: TRL will hand over the log-probs that completions were sampled with.
    """
    if not spec.needs_behaviour:
        return "unused"
    if spec.behaviour == "sampler" or (spec.behaviour is None and sampler_expected):
        return "sampler"
    kept = config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) != 0
    corrected = getattr(config, "use_vllm", False) and getattr(config, "vllm_importance_sampling_correction", False)
    return "old" if kept or corrected else "current"


def aggregation(algorithm: str, config: Any) -> Aggregation:
    """Return how TRL turns per-token terms into one number; the policy loss and the KL beside it go the same way.

    Args:
        algorithm: ``GRPO`` or ``RLOO``.
        config: its config.
    """
    if algorithm == "RLOO":
        return Aggregation("token sum", "RLOO adds up each response's log-probs")
    return Aggregation(_KINDS[config.loss_type], f"loss_type {config.loss_type}")


def by_sequence(config: Any) -> bool:
    """Whether GRPO multiplies one live importance ratio per sequence with the advantages.

    Per-token advantages would then act on the ratio, that is, on the mean log-prob of the whole sequence.

    Args:
        config: a GRPOConfig.
    """
    return config.importance_sampling_level == "sequence" and config.loss_type not in DETACHED_RATIO


def reward_site(algorithm: str, config: Any) -> str:
    """Say what TRL does with a KL in the reward.

    Args:
        algorithm: ``GRPO`` or ``RLOO``.
        config: its config.
    """
    if algorithm == "RLOO":
        after = ", then advantages divided by their std" if getattr(config, "normalize_advantages", False) else ""
        return f"RLOO's own: reward - beta * KL of the completion, then the leave-one-out baseline{after}"
    scale = str(config.scale_rewards)
    after = "" if scale == "none" else f", then division by the {scale}'s std (with tied rewards beta cancels)"
    quantile = getattr(config, "top_entropy_quantile", 1.0)
    kept = f"; tokens of low entropy get none of it (top_entropy_quantile {quantile:g})" if quantile < 1 else ""
    return f"reward - beta * KL of the completion, then the group mean is subtracted{after}{kept}"


def cost(spec: KLSpec, observed: bool = False) -> str:
    """Say what exact terms add to TRL's own work; empty for sampled specs.

    Args:
        spec: the run's spec.
        observed: whether it is observed, so that it has no backward pass.
    """
    if not spec.needs_exact:
        return ""
    if spec.top is not None:
        numbers = numbers_per_token(spec.top, spec.draws)
        recorded = f"{numbers} numbers ({4 * numbers} bytes) per token from the reference's pass"
        if installed() < WITH_KNOWN_HEAD:
            recorded += ", with its head once more"
        if spec.placement != "loss":
            return f"{recorded}, and one more forward pass of the policy, with its head, per rollout"
        if installed() >= WITH_KNOWN_HEAD:
            return recorded
        passes = "forward" if observed else "forward and backward"
        return f"{recorded}, and the policy's head once more ({passes}) per micro-batch"
    if spec.placement != "loss":
        return "one more forward pass of policy and reference, with their heads, per rollout"
    passes = "forward and backward" if spec.estimator == "exact" else "forward"
    return f"a forward pass of the reference and both heads once more ({passes}), per micro-batch"


def sampling_of(config: Any, mode: str | None) -> Sampling:
    """Return how a config samples completions. ``generation_kwargs`` overrides the other settings, as in TRL.

    Args:
        config: a GRPOConfig or RLOOConfig.
        mode: what the engine's log-probs are, for example ``processed_logprobs``; None: not known.
    """
    overrides: Mapping[str, Any] = getattr(config, "generation_kwargs", None) or {}

    def setting(name: str, neutral: float) -> float:
        found = overrides.get(name, getattr(config, name, None))
        return neutral if found is None else found

    others = {name: overrides.get(name) for name in NEUTRAL}
    others["repetition_penalty"] = setting("repetition_penalty", 1.0)
    others["structured_outputs_regex"] = getattr(config, "vllm_structured_outputs_regex", None)
    return Sampling(
        temperature=float(setting("temperature", 1.0)),
        top_p=float(setting("top_p", 1.0)),
        top_k=int(setting("top_k", 0)),
        min_p=float(setting("min_p", 0.0)),
        penalised=any(value is not None and value not in NEUTRAL.get(name, ()) for name, value in others.items()),
        raw=mode is not None and mode != PROCESSED,
        unknown=mode is None,
        logprobs_setting=_where(config),
    )


def _where(config: Any) -> str:
    if not getattr(config, "use_vllm", False):
        return f"the engine behind rollout_func (and, once it is, {ASSUME_VARIABLE}=1)"
    return (
        f"--logprobs-mode of the vLLM server at {_address(config)} (and, if it is set there and the server cannot be "
        f"asked, {ASSUME_VARIABLE}=1)"
    )


def _address(config: Any) -> str:
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def mode_in(config: Any, own_rollout: bool, trl: Version) -> str | None:
    """Return which log-probs the engine reports, as far as config and version decide it; None: they do not.

    Args:
        config: a GRPOConfig or RLOOConfig.
        own_rollout: completions and their log-probs come from the user's ``rollout_func``.
        trl: TRL's version.
    """
    if os.environ.get(ASSUME_VARIABLE) == "1":
        return PROCESSED
    if not getattr(config, "use_vllm", False):
        return None if own_rollout else PROCESSED  # transformers' own generation reports none
    if config.vllm_mode == "server" and trl >= SERVED_BY_VLLM:
        return None
    return PROCESSED  # TRL sets it, in the engine of each process and in its own server


def mode_of_server(config: Any) -> str | None:
    """Ask the vLLM server which log-probs it reports, on one process for all; None if it does not say.

    This waits for the server to come up as long as TRL itself would. It is a collective if there are several processes.

    Args:
        config: a config whose ``vllm_mode`` is ``server``.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    answer = [_asked(config) if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(answer, from_process=0)
    return answer[0]


def _asked(config: Any) -> str | None:
    deadline = time.monotonic() + config.vllm_server_timeout
    while True:
        try:
            with urllib.request.urlopen(f"{_address(config)}/server_info?config_format=json", timeout=10) as response:
                found = json.load(response)["vllm_config"]["model_config"]["logprobs_mode"]
            return str(found)
        except (urllib.error.HTTPError, KeyError, TypeError, ValueError):
            return None  # it answers, but not this
        except OSError:
            if time.monotonic() >= deadline:
                return None
            time.sleep(1.0)
