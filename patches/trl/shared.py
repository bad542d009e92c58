"""Hooks that GRPO and RLOO have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.trl import config as kl_config
from kl_plugins.adapters.trl import guards
from kl_plugins.adapters.trl.exact import cost
from kl_plugins.adapters.trl.log_probs import Scored
from kl_plugins.adapters.trl.loss import aggregation
from kl_plugins.adapters.trl.reward import site
from kl_plugins.adapters.trl.session import Session
from kl_plugins.exact import ExactKL
from kl_plugins.patches.patch import PatchSet
from kl_plugins.patches.trl.exact import TrainerStates
from kl_plugins.receipts import Receipt
from kl_plugins.spec.target import caveats_with_source

ATTRIBUTE = "_kl_plugins"
"""Attribute of a trainer that holds its session; absent on a trainer without a spec, which then is stock TRL."""


TAKEN = "_kl_plugins_taken"
"""Attribute of a config with a spec that a trainer with hooks has taken over."""


def session_of(trainer: Any) -> Session | None:
    """The trainer's session, or None where it trains as stock TRL."""
    session: Session | None = vars(trainer).get(ATTRIBUTE)
    return session


def log_of(trainer: Any) -> Any:
    """TRL's metrics of the current mode."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def micro_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The ``inputs`` argument of ``_compute_loss(model, inputs)``."""
    inputs: dict[str, Any] = args[1] if len(args) > 1 else kwargs["inputs"]
    return inputs


def check_then_post_init(algorithm: str, wrapped: Any, config: Any, args: Any, kwargs: Any) -> None:
    """Around a config's ``__post_init__``: a bad spec fails here, before any model is loaded."""
    text = getattr(config, kl_config.FIELD, None)
    wrapped(*args, **kwargs)
    if text is None:
        return
    kl_config.parse(config, algorithm)


def is_taken(config: Any) -> bool:
    """Whether a trainer with hooks has been built, or is being built, on this config."""
    return bool(vars(config).get(TAKEN, False))


def init_with_session(
    algorithm: str,
    patches: tuple[Any, ...],
    no_checkpointing: Callable[..., Any],
    wrapped: Any,
    trainer: Any,
    args: Any,
    kwargs: Any,
) -> None:
    """Around a trainer's ``__init__``: refusals before TRL builds anything, the session after."""
    arguments = inspect.signature(wrapped).bind_partial(*args, **kwargs).arguments
    config = arguments.get("args")
    spec = kl_config.parse(config, algorithm)
    if spec is None:
        wrapped(*args, **kwargs)
        return
    source, sampling = guards.check_arguments(spec, config, arguments)
    hooks = {patch.attribute: patch.owner().__dict__[patch.attribute] for patch in patches if patch.fingerprints}
    guards.check_overrides(spec, type(trainer), hooks)
    setattr(config, TAKEN, True)
    wrapped(*args, **kwargs)
    # Imported here: it needs transformers, and a config must be checked without.
    from kl_plugins.adapters.trl.callback import KLCallback

    aggregated = aggregation(algorithm, config)
    patch_set = PatchSet("trl", _supported(), patches)

    def receipt() -> Receipt:
        import trl

        return Receipt(
            rank=trainer.accelerator.process_index,
            world_size=trainer.accelerator.num_processes,
            host="TRL",
            host_version=trl.__version__,
            patches=patch_set.names,
            fingerprint=patch_set.fingerprint(),
            spec=str(spec),
            target=spec.target,
            behaviour=source,
            reward_site=site(algorithm, config) if spec.placement == "reward" else "",
            cost=cost(spec),
            aggregation=str(aggregated),
            sampling=str(sampling),
            caveats=(*caveats_with_source(spec, source), *aggregated.caveats, *sampling.caveats(spec, source)),
        )

    controller = Controller(spec.beta, float(trainer.beta), "trainer.beta")
    states = TrainerStates(trainer, no_checkpointing) if spec.needs_exact else None
    session = Session(spec, source, trainer.accelerator, controller, receipt, states)
    setattr(trainer, ATTRIBUTE, session)
    trainer.add_callback(KLCallback(session))


def record_log_probs(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the host's log-prob function: its results are noted, never changed."""
    result = wrapped(*args, **kwargs)
    session = session_of(trainer)
    if session is not None:
        session.recorder.record(Scored(result[0], args, kwargs))
    return result


@contextmanager
def watching_states(session: Session, inputs: dict[str, Any]) -> Iterator[list[ExactKL]]:
    """Within the block, the policy's forward pass also gives the full-vocabulary KL that a ``@loss`` spec needs."""
    if session.state_kl is None or session.is_score:
        yield []
        return
    differentiable = session.spec.estimator == "exact"
    with session.state_kl.watching(inputs["completion_ids"].shape[1], differentiable) as states:
        yield states


def policy_scorer(trainer: Any, no_checkpointing: Callable[..., Any]) -> Callable[[Scored], Tensor]:
    """Scores the tokens of a recorded call under the policy: one forward pass without gradient.

    Args:
        trainer: the trainer.
        no_checkpointing: TRL's context manager that switches gradient checkpointing off.
    """

    def score(call: Scored) -> Tensor:
        session = session_of(trainer)
        kwargs = {name: value for name, value in call.kwargs.items() if name != "model"}
        with torch.no_grad(), no_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
            if session is None:
                raise RuntimeError("kl-plugins: detached in the middle of a rollout")
            with session.recorder.paused():
                logp: Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, *call.args[1:], **kwargs)[0]
        return logp

    return score


def _supported() -> Any:
    from kl_plugins.patches.trl.targets import VERSIONS

    return VERSIONS
