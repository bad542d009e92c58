"""What OpenRLHF's reference actors do under ``top:``: their forward passes also give the k most probable tokens.

The trainer process asks each actor by remote call to watch its model during the forward passes of a rollout batch, and
then for the numbers. So no pass is added, and the actor returns the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from kl_plugins.adapters import receipts
from kl_plugins.adapters.observe import warn_not_of_these_tokens
from kl_plugins.adapters.openrlhf import HOST, REMEDY
from kl_plugins.adapters.openrlhf.config import behaviour_source, spec_of, statement_of
from kl_plugins.adapters.openrlhf.observe import observation_of
from kl_plugins.adapters.openrlhf.top_k import Numbers, carry, of_batches, reference_numbers
from kl_plugins.patches.engine.arguments import arguments
from kl_plugins.patches.engine.instead import instead
from kl_plugins.receipts import MissingReceiptError, Receipt
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation

ATTRIBUTE = "_kl_plugins"
"""Attribute of a reference actor that holds its recorder, and of an experience maker whose actors gave receipts."""


class Asked(NamedTuple):
    """What the reference actors were asked around one call for forward passes.

    Attributes:
        begun: Ray's references to their answers to :func:`start`, by rank.
        numbers: Ray's references to their answers to :func:`stop`, by rank.
    """

    begun: list[Any]
    numbers: list[Any]


class Recorder:
    """Watches the model of a reference actor, and keeps what ``top:`` needs of each forward pass.

    Attributes:
        numbers: of each pass since the start, see :func:`~kl_plugins.adapters.openrlhf.top_k.reference_numbers`.
    """

    def __init__(self, model: Any, k: int, draws: int | None = None) -> None:
        """Begin to watch.

        Args:
            model: OpenRLHF's ``Actor`` of the reference.
            k: number of tokens to keep.
            draws: number of tokens to draw; None for none.
        """
        self.model, self.k, self.draws, self.numbers = model, k, draws, list[Numbers]()
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "return_output": True}  # the pass has the logits anyway

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        log_probs, found = output
        given = arguments(self.model.forward, args, kwargs)
        tokens = given["sequences"], given["action_mask"], given["attention_mask"]
        numbers = reference_numbers(found["logits"], log_probs, *tokens, self.k, self.draws)
        self.numbers.append(numbers.cpu().numpy())
        return log_probs

    def stop(self) -> list[Numbers]:
        """Stop watching, and return the numbers."""
        for handle in self._handles:
            handle.remove()
        return self.numbers


def start(process: Any, k: int, draws: int | None = None) -> None:
    """Let a reference actor keep numbers from now on; runs there.

    Args:
        process: the Ray actor's object, a ``ReferenceModelActor``.
        k: number of tokens to keep.
        draws: number of tokens to draw; None for none.
    """
    stop(process)  # a rollout batch that was broken off leaves its recorder behind
    setattr(process, ATTRIBUTE, Recorder(process.model, k, draws))


def stop(process: Any) -> list[Numbers]:
    """Take the numbers of a reference actor's forward passes since the start; runs there."""
    recorder: Recorder | None = vars(process).pop(ATTRIBUTE, None)
    return [] if recorder is None else recorder.stop()


def receipt(process: Any, spec: str, behaviour: str) -> Receipt:
    """Make the receipt of a reference actor; runs there.

    Args:
        process: the Ray actor's object, a ``ReferenceModelActor`` that has its model.
        spec: the canonical spec that the trainer expects.
        behaviour: where the trainer says that the behaviour policy's log-probs come from.

    Raises:
        RuntimeError: the actor was started with another spec.
    """
    args = process.strategy.args
    observation = observation_of(args)
    found = spec_of(args) if observation is None else observation.measured
    if found is None or str(observation or found) != spec:
        raise RuntimeError(f"it was started with {args.algo.kl.estimator}, not with {spec}")
    ranks = int(process._rank), int(process._world_size)
    return receipts.made(HOST, found, statement_of(found, args), ((), ""), *ranks, observation=observation)


def require_recorders(maker: Any, spec: KLSpec, observation: Observation | None = None) -> None:
    """Raise unless every reference actor can keep the numbers. Asks once for each experience maker.

    Args:
        maker: OpenRLHF's ``RemoteExperienceMaker``.
        spec: the ``@loss`` spec of the run.
        observation: what the run is asked to observe; None if the spec is applied.

    Raises:
        MissingReceiptError: an actor lacks kl-plugins, or has another version or spec; rank, pid and node are named.
    """
    group = maker.initial_model_group
    if spec.top is None or group is None or hasattr(maker, ATTRIBUTE):
        return
    import ray

    behaviour = behaviour_source(spec, maker.args)
    try:
        found = receipts.collect(ray, group._actor_handlers, HOST, observation or spec, behaviour, REMEDY)
    except MissingReceiptError as error:
        raise MissingReceiptError(
            f"{error} These are the workers of OpenRLHF's reference model, whose forward passes have to give its "
            f"{spec.top} most probable tokens"
        ) from None
    setattr(maker, ATTRIBUTE, found)


@contextmanager
def recorded(maker: Any, spec: KLSpec, observation: Observation | None = None) -> Iterator[list[Asked]]:
    """Within the block, let the reference actors keep numbers during their forward passes.

    An actor does what it is asked in the order in which it is asked. So it is asked to begin before the passes and for
    the numbers after them, while they still run, and nothing waits for the answers here.

    Args:
        maker: OpenRLHF's ``RemoteExperienceMaker``.
        spec: the ``@loss`` spec of the run; nothing happens without ``top:``.
        observation: what the run is asked to observe; None if the spec is applied.

    Yields:
        A list that gets the :class:`Asked` of each call for forward passes, for :func:`collect`.
    """
    require_recorders(maker, spec, observation)
    group, asked = maker.initial_model_group, list[Asked]()
    if spec.top is None or group is None:  # the check of the rollout batch names a missing reference
        yield asked
        return
    passes = group.async_run_method_batch

    def with_numbers(*args: Any, **kwargs: Any) -> Any:
        begun = _ask(group, start, spec.top, spec.draws)
        answers = passes(*args, **kwargs)
        asked.append(Asked(begun, _ask(group, stop)))
        return answers

    with instead(group, "async_run_method_batch", with_numbers):
        yield asked


def collect(
    maker: Any, spec: KLSpec, samples: list[Any], asked: list[Asked], observation: Observation | None = None
) -> None:
    """Put the numbers into the experiences, after the forward passes of a rollout batch.

    Args:
        maker: OpenRLHF's ``RemoteExperienceMaker``.
        spec: the ``@loss`` spec of the run; nothing happens without ``top:``.
        samples: the batches that the passes were made for, in that order.
        asked: what :func:`recorded` gave. An error of an actor that could not begin is raised here.
        observation: what the run is asked to observe; the batches then go without numbers instead of an error.

    Raises:
        RuntimeError: a batch has no numbers.
    """
    if spec.top is None or maker.initial_model_group is None:
        return
    import ray

    found: list[Numbers] = []
    for call in asked:
        answers = ray.get([*call.begun, *call.numbers])[len(call.begun) :]
        found += of_batches(answers, maker.args.ds.ring_attn_size, maker.args.ds.tensor_parallel_size)
    try:
        carry(spec, samples, found)
    except RuntimeError:
        if observation is None:
            raise
        warn_not_of_these_tokens(HOST.title, observation)


def _ask(group: Any, function: Any, *args: Any) -> list[Any]:
    return [actor.__ray_call__.remote(function, *args) for actor in group._actor_handlers]
