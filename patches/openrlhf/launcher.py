"""Hooks before training: the check of all arguments at launch, and log-probs of the sampler from generation.

vLLM has to be told when it starts that log-probs will be asked for, and every request has to ask for them. Those that
are missing nevertheless are marked as missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kl_plugins.adapters.micro_batch import current, entered
from kl_plugins.adapters.openrlhf import ADAPTER
from kl_plugins.adapters.openrlhf.batch import OutputKeeper, filled_up, mark_missing
from kl_plugins.adapters.openrlhf.config import PROCESSED, needs_sampler, sampling_in, spec_of
from kl_plugins.adapters.openrlhf.refusals import require_weights
from kl_plugins.patches.engine.arguments import Function, arguments, replaced
from kl_plugins.spec import KLSpec

_launched: list[Any] = []
"""The arguments of this process's run; OpenRLHF does not pass them to the function that makes its engines."""


def hierarchize(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the step from flat to nested arguments, right after parsing and before Ray: a mistake costs seconds."""
    nested = wrapped(*args, **kwargs)
    _launched.clear()
    if hasattr(getattr(nested, "algo", None), "kl"):
        ADAPTER.checked(nested)
        _launched.append(nested)
    return nested


def create_vllm_engines(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the start of vLLM: engines that will be asked for log-probs are started in the right mode."""
    if _launched and needs_sampler(_launched[0]):
        args, kwargs = replaced(wrapped, args, kwargs, logprobs_mode=PROCESSED)
    return wrapped(*args, **kwargs)


@dataclass
class Dispatch:
    """A run with a spec whose prompts are being dispatched: the spec, and OpenRLHF's nested arguments."""

    spec: KLSpec
    args: Any


def dispatch_prompts(wrapped: Function, generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the dispatch of prompts, which builds the sampling parameters."""
    spec = spec_of(generator.args)
    if spec is None:
        return wrapped(*args, **kwargs)
    with entered(Dispatch(spec, generator.args)):
        return wrapped(*args, **kwargs)


def sampling_params(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around vLLM's class, by the name under which OpenRLHF builds it: the sampler's log-probs are asked for.

    A launcher that is not OpenRLHF's own may pass settings that are not among OpenRLHF's arguments. So these are
    checked here.
    """
    run = current(Dispatch)
    if run is None:
        return wrapped(*args, **kwargs)
    require_weights(run.spec, run.args, sampling_in(kwargs))
    if needs_sampler(run.args) and kwargs.get("logprobs") is None:
        kwargs = {**kwargs, "logprobs": 1}
    return wrapped(*args, **kwargs)


async def execute(wrapped: Function, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the single-turn executor; the multi-turn one fails by itself where a log-prob is missing."""
    keeper = OutputKeeper(arguments(wrapped, args, kwargs)["llm_engine"])
    args, kwargs = replaced(wrapped, args, kwargs, llm_engine=keeper)
    response = await wrapped(*args, **kwargs)
    if response["rollout_log_probs"] is not None:
        start, _ = response["action_ranges"][0]
        output = keeper.output.outputs[0]
        mark_missing(response["rollout_log_probs"], start, output.token_ids, output.logprobs)
    return response


def process_response(wrapped: Function, generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the step from a response to an ``Experience``, whose padding would turn absent log-probs into 0.0."""
    response, settings = arguments(wrapped, args, kwargs)["response"], getattr(generator, "args", None)
    if settings is not None and spec_of(settings) is not None and response["rollout_log_probs"] is not None:
        complete = filled_up(response["rollout_log_probs"], len(response["observation_tokens"]))
        args, kwargs = replaced(wrapped, args, kwargs, response={**response, "rollout_log_probs": complete})
    return wrapped(*args, **kwargs)
