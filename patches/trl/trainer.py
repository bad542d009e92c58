"""Hooks that GRPO and RLOO have in common, and the stand-in for a trainer's ``beta``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.micro_batch import current, entered
from kl_plugins.adapters.receipts import made
from kl_plugins.adapters.trl import ADAPTER, HOST, observe
from kl_plugins.adapters.trl.batch import Calls, MicroBatch, Recording, Scored, UnchangedRandomness
from kl_plugins.adapters.trl.config import TAKEN, Run, statement_of
from kl_plugins.adapters.trl.score import Rollout
from kl_plugins.adapters.trl.session import KLCallback, Session
from kl_plugins.patches.trl import HOOKS
from kl_plugins.patches.trl.exact import TrainerStates
from kl_plugins.receipts import Receipt
from kl_plugins.spec.observation import Observation

ATTRIBUTE = "_kl_plugins"
"""Attribute of a trainer that holds its session; absent on a trainer without a spec, which then is stock TRL."""

Product = Callable[[Tensor], Tensor]
"""What the host's ``beta * kl`` becomes, given the host's own KL."""


def session_of(trainer: Any) -> Session | None:
    """Return the trainer's session, or None if it trains as stock TRL."""
    session: Session | None = vars(trainer).get(ATTRIBUTE)
    return session


def log_of(trainer: Any) -> Any:
    """Return TRL's metrics of the current mode."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def post_init(algorithm: str, wrapped: Any, config: Any, args: Any, kwargs: Any) -> None:
    """Hook around a config's ``__post_init__``: a bad spec fails here, before any model is loaded."""
    run = Run(algorithm, config)
    text = run.text
    wrapped(*args, **kwargs)
    if text is not None:
        ADAPTER.checked(run)


def init(algorithm: str, wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> None:
    """Hook around a trainer's ``__init__``: refusals before TRL builds anything, the session after."""
    arguments = inspect.signature(wrapped).bind_partial(*args, **kwargs).arguments
    module = importlib.import_module(f"trl.trainer.{algorithm.lower()}_trainer")
    own = vars(getattr(module, f"{algorithm}Trainer"))
    checked = [name.rpartition(".")[2] for name in HOOKS.sources.checked if name.startswith(f"{module.__name__}:")]
    run = Run(algorithm, arguments.get("args"), arguments, type(trainer), {name: own[name] for name in checked})
    spec, observation = ADAPTER.checked(run), ADAPTER.observation_of(run)
    if spec is None and observation is None:
        wrapped(*args, **kwargs)
        return
    if observation is not None:
        _init_observed(wrapped, trainer, args, kwargs, observation, run)
        return
    statement = statement_of(spec, run)
    setattr(run.config, TAKEN, True)
    wrapped(*args, **kwargs)
    no_checkpointing = module.disable_gradient_checkpointing

    def receipt() -> Receipt:
        accelerator, wrapped_functions = trainer.accelerator, HOOKS.summary(modules=(module.__name__,))
        return made(HOST, spec, statement, wrapped_functions, accelerator.process_index, accelerator.num_processes)

    session = Session(
        HOST,
        spec,
        Controller(spec.beta, float(trainer.beta), "trainer.beta"),
        statement.behaviour,
        accelerator=trainer.accelerator,
        receipt=receipt,
        score_policy=_policy_scorer(trainer, no_checkpointing),
        states=TrainerStates(trainer, no_checkpointing, spec) if spec.needs_exact else None,
    )
    setattr(trainer, ATTRIBUTE, session)
    trainer.add_callback(KLCallback(session))


def _init_observed(wrapped: Any, trainer: Any, args: Any, kwargs: Any, observation: Observation, run: Run) -> None:
    """Build a trainer that trains as TRL's own and whose KL is observed."""
    spec, statement = observation.measured, observe.statement_of(observation, run)
    module = importlib.import_module(f"trl.trainer.{run.algorithm.lower()}_trainer")
    setattr(run.config, TAKEN, True)
    wrapped(*args, **kwargs)

    def receipt() -> Receipt:
        accelerator, functions = trainer.accelerator, HOOKS.summary(modules=(module.__name__,))
        ranks = accelerator.process_index, accelerator.num_processes
        return made(HOST, spec, statement, functions, *ranks, observation=observation)

    session = Session(
        HOST,
        spec,
        Controller(None, float(trainer.beta), "trainer.beta"),
        statement.behaviour,
        observation=observation,
        truncated=statement.sampling is not None and statement.sampling.shows_kept_mass,
        accelerator=trainer.accelerator,
        receipt=receipt,
        score_policy=lambda call: call.logp,  # never called: nothing is scored for an observation
        states=TrainerStates(trainer, module.disable_gradient_checkpointing, spec) if spec.needs_exact else None,
    )
    term = observe.native_term(run)
    session.native = term.spec if term is not None and term.equal else None
    session.scores_reference = observe.scores_reference(run)
    setattr(trainer, ATTRIBUTE, session)
    trainer.add_callback(observe.ObservingCallback(session))


def _policy_scorer(
    trainer: Any, no_checkpointing: Callable[..., AbstractContextManager[None]]
) -> Callable[[Scored], Tensor]:
    def score(call: Scored) -> Tensor:
        kwargs = {name: value for name, value in call.kwargs.items() if name != "model"}
        whole = no_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), whole, entered(None):  # our own call is not one of TRL's
            logp: Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, *call.args[1:], **kwargs)[0]
        return logp

    return score


def record_log_probs(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook around the host's log-prob function: its results are noted, never changed."""
    calls = current(Calls)
    if calls is None or calls.session is not session_of(trainer):
        return wrapped(*args, **kwargs)
    with calls.scoring(args, kwargs):
        result = wrapped(*args, **kwargs)
    calls.note(Scored(result[0], args, kwargs))
    return result


@contextmanager
def recording(session: Session) -> Iterator[Recording]:
    """Within the block, TRL generates and scores completions, and what it scores is noted."""
    recorded = Recording(session)
    with entered(recorded):
        yield recorded


def observed_rollout(
    wrapped: Any, trainer: Any, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Let GRPO generate and score completions; the reference is scored as well where TRL alone leaves it out.

    Under ``top:``, the pass of the reference is recorded for the updates.

    Args:
        wrapped: TRL's ``_generate_and_score_completions``.
        trainer: the trainer.
        session: the trainer's.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    if session.scores_reference:
        recorded: Recording = UnchangedRandomness(session)
        with entered(recorded), reference_scored(trainer):
            output = wrapped(*args, **kwargs)
    else:
        with recording(session) as recorded:
            output = wrapped(*args, **kwargs)
    return recorded.keep(output)


@contextmanager
def rolling_out(trainer: Any, session: Session) -> Iterator[Rollout]:
    """Within the block, TRL generates and scores completions under a score spec."""
    rollout = Rollout(session, session.coefficient(trainer.beta))
    with entered(rollout):
        yield rollout


@contextmanager
def updating(
    trainer: Any, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], averaged: bool
) -> Iterator[MicroBatch]:
    """Within the block, TRL computes the loss of a micro-batch; at its end, all ranks compare what they found.

    Args:
        trainer: the trainer.
        session: the trainer's.
        args: positional arguments of ``_compute_loss(model, inputs)``.
        kwargs: keyword arguments.
        averaged: see :func:`kl_plugins.adapters.trl.batch.per_sequence`.
    """
    session.training = trainer.model.training
    session.coefficient(trainer.beta)
    batch = MicroBatch.of(session, args[1] if len(args) > 1 else kwargs["inputs"], averaged)
    with entered(batch), batch.watched():
        yield batch
    batch.finish(log_of(trainer))


def observing(wrapped: Any, trainer: Any, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let TRL compute its own loss, and measure the observed spec on the log-probs of that loss.

    Args:
        wrapped: TRL's ``_compute_loss``.
        trainer: the trainer.
        session: the trainer's.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        TRL's loss, as it is.
    """
    with updating(trainer, session, args, kwargs, averaged=False) as batch:
        loss = wrapped(*args, **kwargs)
        batch.take_states()
        batch.observe_policy(session.native)
    return loss


def model_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the ``model`` argument of ``_compute_loss(model, inputs)``."""
    return args[0] if args else kwargs["model"]


class SubstitutedBeta(float):
    """A float in every respect but one: its product with a tensor is what the adapter says."""

    product: Product
    uses: int

    def __new__(cls, value: float, product: Product) -> SubstitutedBeta:
        """Make a float of this value."""
        self = super().__new__(cls, value)
        self.product, self.uses = product, 0
        return self

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return float(self) * other
        self.uses += 1
        # After a second use the run ends, so its result does not matter.
        return self.product(other) if self.uses == 1 else float(self) * other

    __rmul__ = __mul__


@contextmanager
def substituted_beta(trainer: Any, product: Product) -> Iterator[None]:
    """Within the block, ``trainer.beta * kl`` is ``product(kl)``; the host has to use it exactly once.

    Raises:
        RuntimeError: the host did not multiply by beta, or did so more than once.
    """
    beta = trainer.beta
    # A coefficient that a user sets to 0 during the run must not make the host leave its KL term out.
    shim = trainer.beta = SubstitutedBeta(beta or 1.0, product)
    try:
        yield
    finally:
        trainer.beta = beta
    if shim.uses != 1:
        raise RuntimeError(
            f"kl-plugins: {type(trainer).__name__} used beta {shim.uses} times where it should have done so once; "
            "its loss takes a path that kl-plugins does not know, so the KL regulariser would be wrong. "
            "Use one of TRL's own GRPOTrainer or RLOOTrainer, or set kl to null."
        )


@contextmanager
def reference_scored(trainer: Any) -> Iterator[None]:
    """Within the block, the host scores the reference, even if a user has set beta to 0 for the time being."""
    beta = trainer.beta
    trainer.beta = beta or 1.0
    try:
        yield
    finally:
        trainer.beta = beta
