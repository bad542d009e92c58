"""How TRL samples completions, and which log-probs its vLLM reports for them."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from kl_plugins.sampling import Sampling

ASSUME_VARIABLE = "KL_PLUGINS_ASSUME_PROCESSED_LOGPROBS"
"""Set to 1, an engine whose mode cannot be found out is taken to report processed log-probs."""

SERVED_BY_VLLM = Version("1.11")
"""From here on the server is vLLM's own, whose mode is set on its command line; TRL's earlier server set it itself."""

PROCESSED = "processed_logprobs"

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


def sampling_of(config: Any, mode: str | None) -> Sampling:
    """The settings of generation in a config; ``generation_kwargs`` overrides the others, as TRL has it.

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
    """Which log-probs the engine reports, as far as config and version decide it; None: they do not.

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
    """Ask the vLLM server, on one process for all; None where it does not say.

    Waits for the server to come up as long as TRL itself would. It is a collective where there are several processes.

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
