"""Hooks where OpenRLHF generates: the sampler's log-probs are asked for, and missing ones are marked as missing."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from kl_plugins.adapters.openrlhf.sampler import Recorder, filled_up, mark_missing
from kl_plugins.adapters.openrlhf.settings import needs_sampler, require_weights, sampling_in, spec_of
from kl_plugins.patches.arguments import Function, arguments, replaced

_dispatching: ContextVar[Any] = ContextVar("kl_plugins_openrlhf_dispatching", default=None)
"""The arguments of a run with a spec whose prompts are being dispatched."""


def dispatch_prompts(wrapped: Function, generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the dispatch of prompts, which builds the sampling parameters."""
    if spec_of(generator.args) is None:
        return wrapped(*args, **kwargs)
    token = _dispatching.set(generator.args)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _dispatching.reset(token)


def sampling_params(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around vLLM's class, by the name under which OpenRLHF builds it: the sampler's log-probs are asked for.

    A launcher of one's own may pass settings that are not among OpenRLHF's arguments, so these are checked here.
    """
    settings = _dispatching.get()
    if settings is None:
        return wrapped(*args, **kwargs)
    spec = spec_of(settings)
    if spec is not None:
        require_weights(spec, settings, sampling_in(kwargs))
    if needs_sampler(settings) and kwargs.get("logprobs") is None:
        kwargs = {**kwargs, "logprobs": 1}
    return wrapped(*args, **kwargs)


async def execute(wrapped: Function, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the single-turn executor; the multi-turn one fails by itself where a log-prob is missing."""
    recorder = Recorder(arguments(wrapped, args, kwargs)["llm_engine"])
    args, kwargs = replaced(wrapped, args, kwargs, llm_engine=recorder)
    response = await wrapped(*args, **kwargs)
    if response["rollout_log_probs"] is not None:
        start, _ = response["action_ranges"][0]
        output = recorder.output.outputs[0]
        mark_missing(response["rollout_log_probs"], start, output.token_ids, output.logprobs)
    return response


def process_response(wrapped: Function, generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the step from a response to an ``Experience``, whose padding would turn absent log-probs into 0.0."""
    response, settings = arguments(wrapped, args, kwargs)["response"], getattr(generator, "args", None)
    if settings is not None and spec_of(settings) is not None and response["rollout_log_probs"] is not None:
        complete = filled_up(response["rollout_log_probs"], len(response["observation_tokens"]))
        args, kwargs = replaced(wrapped, args, kwargs, response={**response, "rollout_log_probs": complete})
    return wrapped(*args, **kwargs)
