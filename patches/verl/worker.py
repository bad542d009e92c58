"""Hooks in veRL's training workers: the loss, one optimizer step, checkpoints; and the worker's receipt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kl_plugins.adapters import receipts
from kl_plugins.adapters.base import parse, parse_observation
from kl_plugins.adapters.checkpoints import read_state, record, resumed, write_state
from kl_plugins.adapters.micro_batch import KLSource, LossBatch, carried, current, entered, unknown_place
from kl_plugins.adapters.observe import require_unregularised, warn_not_of_these_tokens
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.verl import HOST, LOSS_KEY, SCORE_KEY, batch
from kl_plugins.adapters.verl.config import sampling_of, statement_of
from kl_plugins.adapters.verl.exact import CELLS, EXACT, REMAINDER, cost, packed_kl, packed_top_k
from kl_plugins.adapters.verl.observe import default_word, observed_in
from kl_plugins.adapters.verl.session import Session, loss_elsewhere, session_of
from kl_plugins.adapters.verl.shared_sequences import shared
from kl_plugins.adapters.verl.top_k import LOG_PROBS, LOGITS, NEVER_SHOWN, missing
from kl_plugins.patches.engine.arguments import Function, arguments, replaced
from kl_plugins.patches.engine.instead import instead
from kl_plugins.patches.engine.patch import Hook
from kl_plugins.patches.verl import HOOKS
from kl_plugins.probe import Cells
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec, looks_like_spec
from kl_plugins.spec.observation import Observation, looks_like_observation

if TYPE_CHECKING:
    from torch import Tensor

SHOW, ONLY, ENTROPY = "distillation_use_topk", "distillation_only", "calculate_entropy"
"""veRL's switches: show the logits to the loss function; compute no log-probs; compute the entropy."""

CROSS_ENTROPY = "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE"
"""veRL's variable: whether flash-attention's cross entropy can compute log-probs."""

PLACES = "a @loss spec works in veRL's ppo_loss, a @reward or @advantage spec in its apply_kl_penalty"


def kl_penalty(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``kl_penalty(logprob, ref_logprob, kl_penalty)``: a spec gets its own term; native names pass through."""
    named = arguments(wrapped, args, kwargs)
    if looks_like_observation(named["kl_penalty"]):
        return _observed(wrapped, args, kwargs, named)
    if not looks_like_spec(named["kl_penalty"]):
        return wrapped(*args, **kwargs)
    source = current(KLSource)
    if source is None:
        HOOKS.check_process()  # a missing hook is the most probable reason, and this error says more about it
        raise unknown_place(named["kl_penalty"], HOST.title, PLACES)
    return source.term(named["logprob"], named["ref_logprob"])


def _observed(wrapped: Function, args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]) -> Any:
    """Let veRL compute its own KL under its own word, and measure the observed spec on the same log-probs."""
    source, policy, reference = current(KLSource), named["logprob"], named["ref_logprob"]
    found = parse_observation(named["kl_penalty"])
    word = found.native or default_word(LOSS_KEY if isinstance(source, LossBatch) else SCORE_KEY)
    args, kwargs = replaced(wrapped, args, kwargs, kl_penalty=word)
    kl = wrapped(*args, **kwargs)
    if source is not None:
        source.observe(policy, reference, lambda logp: wrapped(logp, reference.detach(), word))
    return kl


def ppo_loss(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``ppo_loss(config, model_output, data, dp_group)``: its batch is carried to the KL function."""
    if LOGITS in kwargs:  # the engine shows its logits; only asked to where a spec needs them
        return _on_logits(current(Session), **kwargs)
    named = dict(arguments(wrapped, args, kwargs))
    config = named["config"]
    if config.use_kl_loss and looks_like_observation(config.kl_loss_type):
        return _observed_loss(wrapped, args, kwargs, named["model_output"], named["data"])
    if not (config.use_kl_loss and looks_like_spec(config.kl_loss_type)):
        return wrapped(*args, **kwargs)
    session = current(Session)
    if session is None:
        raise RuntimeError(
            f"kl-plugins: veRL's PPO loss was called with {config.kl_loss_type} outside of TrainingWorker.train_batch; "
            "this engine or trainer is not one that kl-plugins was tested with"
        )
    micro_batch = batch.read(session, named["data"])
    if session.spec.needs_exact:
        shown = partial(_of_model_output, session.spec, named["model_output"], named["data"])
        pending, session.pending = session.pending, None
        if pending is not None:
            micro_batch.exact, micro_batch.remainder = pending.with_log_probs(session.spec, shown(LOG_PROBS))
        else:
            micro_batch.exact = shown(EXACT)
            micro_batch.remainder = None if session.spec.top is None else shown(REMAINDER)
    named["config"] = session.config_with_beta(config)
    with carried(micro_batch):
        loss, metrics = wrapped(**named)
    metrics.update(session.metrics(micro_batch, _metric))
    return loss, metrics


def _observed_loss(
    wrapped: Function, args: tuple[Any, ...], kwargs: dict[str, Any], model_output: Any, data: Any
) -> Any:
    """Let veRL compute its own loss; the metrics of the observed spec join veRL's."""
    session = current(Session)
    if session is None:
        return wrapped(*args, **kwargs)
    micro_batch = batch.read(session, data)
    if session.spec.needs_exact:
        _take_states(session, micro_batch, model_output, data)
    with entered(micro_batch):
        loss, metrics = wrapped(*args, **kwargs)
    if micro_batch.metrics is not None:
        metrics.update(session.metrics(micro_batch, _metric))
    return loss, metrics


@torch.no_grad()
def _take_states(session: Session, micro_batch: LossBatch, model_output: Any, data: Any) -> None:
    """Give a micro-batch what an observed spec with ``top:`` needs, unless the reference's numbers are of no use."""
    assert session.observation is not None
    pending, session.pending = session.pending, None
    if session.misplaced or (pending is None and EXACT not in model_output):
        warn_not_of_these_tokens(HOST.title, session.observation)
        return
    shown = partial(_of_model_output, session.spec, model_output, data)
    if pending is None:
        micro_batch.exact, micro_batch.remainder = shown(EXACT), shown(REMAINDER)
        micro_batch.cells = Cells(*map(shown, CELLS)) if session.probing else None
        return
    log_probs = shown(LOG_PROBS)
    micro_batch.exact, micro_batch.remainder = pending.with_log_probs(session.spec, log_probs)
    micro_batch.cells = pending.cells(log_probs) if session.probing else None


def _metric(aggregation: str, value: float) -> Any:
    from verl.utils.metric import Metric

    return Metric(aggregation=aggregation, value=value)


def train_batch(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around one optimizer step of a worker."""
    session = session_of(worker)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.observation is not None:
        session.steps += 1
        session.applied = float(session.loss_fn.keywords["config"].kl_loss_coef)
        session.misplaced, session.pending = 0.0, None
        with entered(session), _showing_logits(session, arguments(wrapped, args, kwargs)["data"]):
            return wrapped(*args, **kwargs)
    session.require_confirmed("require_receipts(worker_group, spec)")
    session.start_step()
    # Under sequence parallelism several ranks hold the same tokens; veRL collects outputs from one of them.
    session.counted, session.elsewhere = worker.engine.is_mp_src_rank_with_outputs(), loss_elsewhere()
    with (
        entered(session),
        _showing_logits(session, arguments(wrapped, args, kwargs)["data"]),
        _checked_steps(worker.engine, session),
    ):
        return wrapped(*args, **kwargs)


@contextmanager
def _checked_steps(engine: Any, session: Session) -> Iterator[None]:
    """Within the block, the engine's optimizer steps only if the step's log-probs are sound on all ranks.

    Then the gradients are there, and nothing is updated yet. veRL itself would skip the update where the norm of the
    gradient is not finite, and go on.

    Raises:
        RuntimeError: the block ended without a step.
    """
    step, steps = engine.optimizer_step, 0

    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        session.check_step(_total)
        steps += 1
        return step(*args, **kwargs)

    with instead(engine, "optimizer_step", checked):
        yield
    if steps != 1:
        raise RuntimeError(
            f"kl-plugins: veRL's engine took {steps} optimizer steps in one train_batch instead of one, so the "
            f"log-probs that {session.spec} needs were not checked; this engine is not known"
        )


def _total(numbers: Tensor) -> Tensor:
    # Over all ranks, and not over the data-parallel ones alone: an error has to stop those that share a sequence too.
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
    return numbers


def save_checkpoint(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a worker's checkpoint: the spec and the controller's state go beside its shard."""
    result = wrapped(*args, **kwargs)
    session, folder = session_of(worker), arguments(wrapped, args, kwargs)["local_path"]
    if session is not None and session.observation is None and folder:
        write_state(_state_file(folder, worker), record(session.spec, session.controller.saved()))
    return result


def load_checkpoint(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a worker's resume: another spec is refused before anything is loaded."""
    session, folder = session_of(worker), arguments(wrapped, args, kwargs)["local_path"]
    if session is not None and session.observation is not None and folder:
        require_unregularised(read_state(_state_file(folder, worker)), session.observation)
    elif session is not None and folder:
        # Read first: veRL may delete the folder after loading.
        session.controller.restore(resumed(read_state(_state_file(folder, worker)), session.spec))
    return wrapped(*args, **kwargs)


def _state_file(folder: str, worker: Any) -> Path:
    return Path(folder) / f"kl_plugins_rank_{worker.rank}.json"


@contextmanager
def _showing_logits(session: Session, data: Any) -> Iterator[None]:
    """Within the block, the engine shows the logits of each micro-batch, and what they are compared with is ready.

    That is the reference model, or under ``top:`` what the batch carries of it. veRL has this seam for a distillation
    loss.

    Args:
        session: the worker's; does nothing unless its spec has exact terms.
        data: the mini-batch that the engine is going to train on.

    Raises:
        RuntimeError: the batch carries nothing of the reference.
    """
    if not session.spec.needs_exact:
        yield
        return
    from verl.utils import tensordict_utils

    if session.spec.top is not None and KEY not in data.keys():  # noqa: SIM118  TensorDict has no plain `in`
        if session.observation is None:
            raise missing(session.spec)
        yield  # an observation does not stop a run
        return
    tensordict_utils.assign_non_tensor(data, **{SHOW: True})
    if session.spec.top is None:
        with session.reference.engine.eval_mode():
            yield
    else:
        yield


def _on_logits(session: Session | None, *, config: Any, data: Any, **shown: Tensor) -> dict[str, Tensor]:
    """Give the KL of each packed position; the engine calls the loss function with its logits for that.

    Raises:
        RuntimeError: the engine shows logits that no exact spec asked for.
    """
    if session is None or not session.spec.needs_exact:
        raise RuntimeError("kl-plugins: veRL's engine showed its logits to a PPO loss that did not ask for them")
    spec, logits, overwritten = session.spec, shown[LOGITS], _backward_overwrites(data)
    if spec.top is None:
        return packed_kl(spec, logits, lambda: _reference_logits(session, data), data, overwritten)
    # Log-probs are gathered from the ranks that share a sequence, logits are not.
    given = spec, logits, data, overwritten, log_probs_in_32_bits(logits) and not shared()
    if session.observation is not None:
        with torch.no_grad():
            found, session.pending, session.misplaced = packed_top_k(*given, probed=session.probing)
        return found
    found, session.pending, misplaced = packed_top_k(*given)
    session.misplaced = max(session.misplaced, misplaced)
    return found


def _of_model_output(spec: KLSpec, model_output: Any, data: Any, key: str) -> Tensor:
    """Return as (B, T) what :func:`_on_logits` gave the engine under a key.

    Raises:
        RuntimeError: the engine never showed its logits.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    if key not in model_output:
        raise RuntimeError(
            f"kl-plugins: veRL's engine never showed its logits, so {spec} could not be computed; {NEVER_SHOWN}"
        )
    padded: Tensor = no_padding_2_padding(model_output[key], data)
    return padded


def _reference_logits(session: Session, data: Any) -> Tensor:
    from verl.utils import tensordict_utils

    caught: list[Tensor] = []

    def catch(model_output: Any = None, data: Any = None, dp_group: Any = None, **shown: Tensor) -> Any:
        if LOGITS in shown:
            caught.append(shown[LOGITS])
            return {}
        return torch.zeros(()), {}

    copied = data.copy()
    tensordict_utils.assign_non_tensor(copied, **{SHOW: True, ONLY: True, ENTROPY: False})
    with torch.no_grad():
        session.reference.engine.forward_step(copied, loss_function=catch, forward_only=True)
    return caught[0]


def _backward_overwrites(data: Any) -> bool:
    """Whether veRL's log-probs are differentiated in place: by flash-attention's cross entropy, without an entropy."""
    from verl.utils import tensordict_utils, torch_functional

    if tensordict_utils.get_non_tensor_data(data=data, key=ENTROPY, default=False):
        return False
    return bool(getattr(torch_functional, CROSS_ENTROPY, True))


def log_probs_in_32_bits(logits: Tensor) -> bool:
    """Whether veRL computes the log-probs of these logits in float32: flash-attention's cross entropy always does."""
    from verl.utils import torch_functional

    if logits.element_size() >= 4:
        return True
    switched_off = os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") == "1"
    return bool(getattr(torch_functional, CROSS_ENTROPY, False)) and not switched_off


def receipt(process: Any, spec: str, behaviour: str) -> Receipt:
    """Make the receipt of a Ray worker, and allow it to train.

    Args:
        process: the Ray actor's object: a training worker, or one that holds training workers, or one that holds the
            reference alone.
        spec: the canonical spec that the trainer expects.
        behaviour: where the trainer says that the behaviour policy's log-probs come from.

    Raises:
        RuntimeError: the worker's loss would not go through the hooks, or holds another spec.
        UnsupportedHostError: this veRL is not one that was checked.
    """
    HOOKS.check_process()
    # A role that has an inner actor trains through that one.
    sessions = [session_of(getattr(role, "actor", None) or role) for role in _roles(process)]
    session = next((found for found in sessions if found is not None), None)
    if session is None and (scoring := _scoring(process)) is not None:
        seen = observed_in(LOSS_KEY, spec)
        measured, observation = (parse(spec), None) if seen is None else (seen.observation.measured, seen.observation)
        return _made(process, measured, scoring.config.actor, behaviour, observation)
    if session is None:
        raise RuntimeError("its loss function holds no KL spec; was it started with another config?")
    if not isinstance(getattr(session.loss_fn, "func", None), Hook):
        raise RuntimeError(f"its loss function {session.loss_fn} is not veRL's hooked ppo_loss")
    if session.text != spec:
        raise RuntimeError(f"its loss function holds {session.text}, not {spec}")
    if session.spec.needs_exact and session.spec.top is None:
        session.reference = _reference(process)
    session.confirmed, session.behaviour = True, behaviour
    if session.observation is not None:
        session.truncated = _shows_kept_mass(process)
    return _made(process, session.spec, session.loss_fn.keywords["config"], behaviour, session.observation)


def _shows_kept_mass(process: Any) -> bool:
    """Whether the settings that this process knows say that a sampler's log-probs are those of a truncated policy."""
    for role in _roles(process):
        if getattr(getattr(role, "config", None), "rollout", None) is not None:
            return sampling_of(SimpleNamespace(actor_rollout_ref=role.config)).shows_kept_mass
    return False


def _made(process: Any, spec: KLSpec, actor: Any, behaviour: str, observation: Observation | None = None) -> Receipt:
    statement = statement_of(spec, actor, behaviour, cost=cost(spec))
    wrapped = HOOKS.summary(modules=[name for name in HOOKS.modules if name.startswith("verl.workers")])
    ranks = int(process.rank), int(process.world_size)
    return receipts.made(HOST, spec, statement, wrapped, *ranks, observation=observation)


def _scoring(process: Any) -> Any:
    """Find the role of this process that holds the reference and nothing else; None if it has another role."""
    roles = [role for role in _roles(process) if getattr(role, "role", None) is not None]
    return roles[0] if roles and all(role.role == "ref" for role in roles) else None


def _reference(process: Any) -> Any:
    """Find the worker of this process that holds the reference model.

    Raises:
        RuntimeError: there is none, so its logits are out of reach.
    """
    for role in _roles(process):
        reference = getattr(role, "ref", None)
        if reference is not None:
            return reference
    raise RuntimeError(
        "it has no reference model beside the actor, and exact terms need its logits; use exact@loss/top, which "
        "takes what it needs from the reference's own pass, wherever that runs"
    )


def _roles(process: Any) -> list[Any]:
    held = [process]
    for name in ("worker_dict", "fused_worker_dict"):  # roles that share one process
        held += list((getattr(process, name, None) or {}).values())
    return held
