"""The reference's top-k numbers in veRL: from its forward pass through the trainer to the actor's micro-batches.

veRL splits, shuffles and joins batches row by row, and knows rows of numbers of any length best. So the numbers of
each response token lie one after the other in one flat row per sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.top_k import KEY, generator_of, packed
from kl_plugins.adapters.verl.batch import response_spans
from kl_plugins.adapters.verl.shared_sequences import of_all, own_range, shared
from kl_plugins.reference import reference_top_k
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import numbers_per_token
from kl_plugins.top_k import reference_of, tokens_in_runs

LOGITS = "student_logits"
"""Argument under which veRL's engine hands (1, N, V) temperature-scaled logits to a loss function."""

LOG_PROBS = "log_probs"
"""Key in the engine's model output: (B, j) nested log-probs of the next token at each packed position, nats."""

ASKED = "kl_plugins_top_k"
"""Note in a batch of the reference's pass: the k of the spec, if the pass has to give the top-k numbers."""

DRAWS_ASKED = "kl_plugins_draws"
"""Note in such a batch: how many tokens the spec lets the reference draw; left out if it draws none."""

ROW = "kl_plugins_row"
"""Key in the older trainer's batch: the row that a sequence had when the reference scored it."""

NEVER_SHOWN = (
    "this engine or its settings (fused kernels compute log-probs without logits) are not ones that exact terms know"
)


class Recorder:
    """Takes the place of the loss function in a forward pass of the reference, and adds the numbers to its output."""

    def __init__(self, k: int, in_32_bits: Callable[[Tensor], bool], draws: int | None = None) -> None:
        """Ask for k tokens.

        Args:
            k: number of tokens per state; the whole vocabulary if it has fewer.
            in_32_bits: tells whether veRL is going to compute log-probs of some logits in float32.
            draws: number of tokens to draw per state; None for none.
        """
        self._k, self._in_32_bits, self._draws = k, in_32_bits, draws
        self._finish: Callable[[Any], Tensor] | None = None

    def __call__(self, model_output: Any = None, data: Any = None, dp_group: Any = None, **shown: Tensor) -> Any:
        """Take what is needed of the logits, then put the numbers beside the log-probs of the same micro-batch.

        Raises:
            RuntimeError: veRL's engine showed no logits.
        """
        if LOGITS in shown:
            logits = shown[LOGITS]
            self._finish = recorded(logits, data, self._k, self._in_32_bits(logits), self._draws or 0)
            return {}
        if self._finish is None:
            raise RuntimeError(
                "kl-plugins: the engine of veRL's reference never showed its logits, so its most probable tokens are "
                f"not known; {NEVER_SHOWN}"
            )
        model_output[KEY], self._finish = self._finish(model_output), None
        return torch.ones(()), {}  # what veRL itself reports of a pass without a loss


def recorded(logits: Tensor, data: Any, k: int, with_log_probs: bool, draws: int = 0) -> Callable[[Any], Tensor]:
    """Take the reference's top-k tokens in all states in which a response token was drawn.

    Args:
        logits: (1, N, V) of the reference, scaled by the temperature; where ranks share sequences, of this rank's part
            of the packed positions.
        data: veRL's micro-batch.
        k: number of tokens per state.
        with_log_probs: veRL's own log-probs of these logits are going to be float32, and save a pass over them.
        draws: number of tokens to draw per state.

    Returns:
        A function of veRL's output for the micro-batch. It gives (B, j) nested float32: the numbers of each
        response token of a sequence, one after the other.
    """
    spans = response_spans(data)
    # Parts of the logits are views; to select all states at once would copy them.
    tokens: Tensor = data["input_ids"].values()
    if shared():
        given = _of_shared(logits[0], spans, k, tokens, draws)
        return lambda output: _nested(given)
    labels = [tokens[start + 1 : stop + 1] for start, stop in spans]
    if not with_log_probs:
        numbers = [_numbers(logits[0, a:b], own, k, draws) for (a, b), own in zip(spans, labels, strict=True)]
        return lambda output: _nested(numbers)
    drawn_from = torch.cat(labels)
    generator = generator_of(drawn_from) if draws else None
    states = [slice(start, stop) for start, stop in spans]
    ids, drawn, odds = tokens_in_runs(logits[0], states, drawn_from, k, draws, generator=generator)
    vocabulary = logits.shape[-1]

    def finish(output: Any) -> Tensor:
        every = output[LOG_PROBS].values().detach()
        own = torch.cat([every[start:stop] for start, stop in spans])
        numbers = packed(reference_of(ids, odds + own[:, None], vocabulary, draws=drawn))
        return _nested(list(torch.split(numbers, [stop - start for start, stop in spans])))

    return finish


def _numbers(logits: Tensor, labels: Tensor, k: int, draws: int) -> Tensor:
    """Take the numbers of some states from their logits alone."""
    generator = generator_of(labels) if draws else None
    return packed(reference_top_k(logits, k, labels=labels, draws=draws, generator=generator))


def _of_shared(logits: Tensor, spans: list[tuple[int, int]], k: int, tokens: Tensor, draws: int) -> list[Tensor]:
    """Take the numbers of the states whose (M, V) logits are here, and get those of the others from their ranks."""
    first, end = own_range(len(tokens))
    held = logits.new_zeros(len(logits), numbers_per_token(min(k, logits.shape[-1]), draws), dtype=torch.float32)
    for start, stop in spans:
        here = slice(max(start, first) - first, min(stop, end) - first)
        if here.start < here.stop:
            labels = tokens[first + here.start + 1 : first + here.stop + 1]
            held[here] = _numbers(logits[here], labels, k, draws)
    numbers = of_all(held, len(tokens))
    return [numbers[start:stop] for start, stop in spans]


def _nested(numbers: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor([part.flatten() for part in numbers], layout=torch.jagged)


def carried(data: Any, size: int, tokens: int) -> Tensor | None:
    """Read the numbers out of a micro-batch.

    Args:
        data: veRL's micro-batch.
        size: how many numbers were recorded for each token.
        tokens: number of response tokens in the micro-batch, padding left out.

    Returns:
        (tokens, size) float32, sequence by sequence; None if the micro-batch has them for more or fewer tokens.
    """
    field: Tensor = data[KEY]
    numbers = (field.values() if field.is_nested else field).reshape(-1)
    return numbers.view(tokens, size) if numbers.numel() == tokens * size else None


def missing(spec: KLSpec) -> RuntimeError:
    """Make the error for a reference that gave log-probs and no top-k numbers."""
    notes = f"{ASKED}={spec.top}" if spec.draws is None else f"{ASKED}={spec.top} and {DRAWS_ASKED}={spec.draws}"
    return RuntimeError(
        f"kl-plugins: {spec} needs the reference's {spec.top} most probable tokens of each state, but the pass that "
        "computed ref_log_prob gave none. Either kl-plugins is missing or switched off in the processes of the "
        "reference (install it on every node, and leave VERL_USE_EXTERNAL_PLUGINS unset), or the trainer is not one "
        f"of veRL's own: it then has to put {notes} as a note into the batch of the reference's pass, and {KEY} of the "
        "result into the batch of the update"
    )


def keep(output: Any, result: Any) -> Tensor:
    """Take the numbers out of the reference's output, before the older trainer pads log-probs to full width.

    Its batch gets the numbers of the rows instead, because the critic needs nothing more.

    Args:
        output: what the reference's workers returned.
        result: veRL's ``DataProto`` that becomes part of the batch; changed in place.

    Returns:
        (B, j) nested float32.
    """
    numbers: Tensor = output[KEY]
    result.batch[ROW] = torch.arange(len(result.batch))
    return numbers


def put_back(data: Any, kept: Tensor) -> None:
    """Put the numbers into the older trainer's batch, in its present order of rows; in place.

    Args:
        data: veRL's ``DataProto``; its rows may have been moved, left out or repeated.
        kept: what :func:`keep` gave.
    """
    rows = data.batch.pop(ROW).tolist()
    if rows != list(range(kept.size(0))):
        parts = kept.unbind()
        kept = torch.nested.as_nested_tensor([parts[row] for row in rows], layout=torch.jagged)
    data.batch[KEY] = kept
