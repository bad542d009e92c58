"""How old the data of an update are, where veRL's trainer knows which weights generated each response.

veRL numbers the weights that it sends to its engine, and the engine gives each response the numbers of the weights
that generated its first and its last token. An age of 1 says: since the weights that generated the first token, the
trainer has sent its weights once. In the synchronous trainer every age is 0, and no age is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

MEAN, LARGEST = "kl/age/mean", "kl/age/max"

FIRST_TOKEN = "min_global_steps"
"""veRL's key of the number of the weights that generated the first token of a response."""

V1_MODES = ("colocate_async", "separate_async")
"""Modes of the v1 trainer in which responses may be older than the weights that are trained."""


def ages_of(trainer: Any, batch: Any) -> list[int]:
    """Give the age of each response of a batch that is about to be trained on.

    Args:
        trainer: one of veRL's trainers.
        batch: what its ``_update_actor`` gets: a ``DataProto``, or in the v1 trainers the names of rows with tags.

    Returns:
        Numbers of times that weights were sent; empty where the trainer is synchronous or does not know.
    """
    present = _version(trainer)
    if present is None:
        return []
    found = [_sent(trainer, number) for number in _numbers(batch)]
    return [] if None in found else [present - number for number in found if number is not None]


def report(metrics: MutableMapping[str, Any], ages: Iterable[int]) -> None:
    """Put the mean and the largest age into a trainer's metrics; nothing where there are none.

    Args:
        metrics: of a step.
        ages: of its responses.
    """
    found = list(ages)
    if found:
        metrics[MEAN], metrics[LARGEST] = sum(found) / len(found), max(found)


def _version(trainer: Any) -> int | None:
    """Return the number of the weights that a trainer has in the present step; None where it is synchronous."""
    if hasattr(trainer, "current_param_version"):  # fully asynchronous
        return int(trainer.current_param_version)
    if hasattr(trainer, "_async_gen_next_batch") or getattr(trainer, "trainer_mode", None) in V1_MODES:
        return int(trainer.global_steps) - 1
    return None


def _sent(trainer: Any, number: Any) -> int | None:
    """Return how many updates are in the weights that have a number.

    The one-step-off trainer sends its weights in the middle of a step, before the update, under the number of the step.
    """
    if number is None:
        return None
    early = hasattr(trainer, "_async_gen_next_batch")
    return max(int(number) - 1, 0) if early else int(number)


def _numbers(batch: Any) -> list[Any]:
    tags = getattr(batch, "tags", None)
    if tags is not None:
        return [tag.get(FIRST_TOKEN) for tag in tags if not tag.get("is_padding", False)]
    return list((getattr(batch, "non_tensor_batch", None) or {}).get(FIRST_TOKEN, ()))
