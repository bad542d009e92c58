"""The KL over the reference's top-k tokens, from log-probs that a host computes anyway: no pass over the vocabulary.

``exact_kl(..., reference=)`` computes the same from logits alone. The functions here are for places where the log-prob
of each label is known in float32, for the policy with its graph, as in a trainer's loss. Then the log-prob of another
token follows from two logits, and its gradient goes through the trainer's own backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kl_plugins.exact import TopKKL
from kl_plugins.kernels.exact.arguments import check_floats, checked_labels, checked_reference, flat_rows, row_options
from kl_plugins.kernels.exact.bucket import TopKReference
from kl_plugins.kernels.exact.kept_log_probs import (
    kl_of_log_probs,
    log_of_tail,
    selected_logits,
    selected_logits_shared,
)
from kl_plugins.kernels.exact.reference import RefDraws, RefTopK
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, scaled
from kl_plugins.kernels.exact.tail_draws import Draws, Runs, tail_draws
from kl_plugins.kernels.exact.tiled_search import TiledSearch
from kl_plugins.kernels.exact.top_tokens import group_maxima, largest_of
from kl_plugins.kernels.exact.top_tokens import top_tokens as rows_top_tokens

__all__ = [
    "Draws",
    "TiledSearch",
    "log_odds",
    "reference_of",
    "tokens_in_runs",
    "top_and_drawn_tokens",
    "top_k_kl",
    "top_tokens",
]


@torch.no_grad()
def top_tokens(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest logits of each position, the largest first.

    Args:
        logits: (..., V), any float dtype.
        k: number of tokens; the whole vocabulary if it has fewer.

    Returns:
        (..., k) int64.

    Raises:
        ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    found = rows_top_tokens(flat_rows(logits), k)
    return found.view(*logits.shape[:-1], found.shape[-1])


@torch.no_grad()
def top_and_drawn_tokens(
    logits: Tensor, labels: Tensor, k: int, draws: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Draws]:
    """Return the ids of the k largest logits of each position, and tokens drawn from all others.

    The draws of a position are independent of each other and of its label, and come from a distribution near the
    model's own. Ranks that hold the same logits get the same draws from generators with the same state.

    Args:
        logits: (..., V) of the reference, any float dtype, divided by the temperature.
        labels: (...) int64 tokens; a negative label stands for token 0.
        k: number of tokens; the whole vocabulary if it has fewer.
        draws: number of draws.
        generator: source of the random numbers, on the device of the logits; torch's own by default.

    Returns:
        (..., k) int64, the largest first; and the draws, for :func:`reference_of`.

    Raises:
        ValueError: if k or draws is below 1.
    """
    if k < 1 or draws < 1:
        raise ValueError(f"k={k}, draws={draws}: must be at least 1")
    rows, shape = flat_rows(logits), logits.shape[:-1]
    levels = group_maxima(rows, k)
    ids = largest_of(levels, k)
    found = tail_draws(levels, ids, labels.reshape(-1).clamp_min(0), draws, generator)
    drawn = found.draws(torch.promote_types(logits.dtype, torch.float32))
    drawn_ids, log_rate = (part.view(*shape, draws) for part in drawn[:2])
    return ids.view(*shape, ids.shape[-1]), Draws(drawn_ids, log_rate, drawn.label_log_rate.view(shape))


@torch.no_grad()
def tokens_in_runs(
    logits: Tensor,
    runs: Sequence[slice],
    labels: Tensor,
    k: int,
    draws: int = 0,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Draws | None, Tensor]:
    """Return the k most probable tokens of some runs of neighbouring rows, draws from all others, and their log-odds.

    A trainer's logits hold rows of prompts and of padding between those of responses, and a selection of rows would
    copy their logits. Here all runs are searched at once where they are.

    Args:
        logits: (M, V) of the reference, any float dtype, divided by the temperature.
        runs: rows to search, n together, each with a start and a stop.
        labels: (n,) int64 tokens; a negative label stands for token 0.
        k: number of tokens; the whole vocabulary if it has fewer.
        draws: number m of draws; 0 for none.
        generator: source of their random numbers, as in :func:`top_and_drawn_tokens`.

    Returns:
        (n, k) int64, the largest first; the draws, or None; and (n, k + m) what :func:`log_odds` gives for both, nats,
        without a graph.

    Raises:
        ValueError: if k is below 1, or there are not as many labels as rows.
    """
    size = sum(run.stop - run.start for run in runs)
    if k < 1 or size != len(labels):
        raise ValueError(f"k={k}: must be at least 1; {len(labels)} labels for {size} rows")
    # Each run is searched alone, because its numbers fit into the processor's caches. The draws are made together.
    by_run = [group_maxima(logits.detach()[run], k) for run in runs or [slice(0, 0)]]
    ids = torch.cat([largest_of(levels, k) for levels in by_run])
    every = [Runs(parts) for parts in zip(*by_run, strict=True)]
    labels, dtype = labels.clamp_min(0), torch.promote_types(logits.dtype, torch.float32)
    drawn = tail_draws(every, ids, labels, draws, generator).draws(dtype) if draws else None
    tokens = ids if drawn is None else torch.cat([ids, drawn.ids], -1)
    values = every[0].gather(-1, torch.cat([tokens, labels[:, None]], -1)).to(dtype)
    return ids, drawn, values[:, :-1] - values[:, -1:]


def log_odds(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    share_grad: bool = False,
) -> Tensor:
    """Return log(p_a / p_label) for some tokens a of each position.

    It is the difference of two logits. Added to the log-prob of the label, it is the log-prob of a.

    Args:
        logits: (..., V), any float dtype, with their graph.
        labels: (...) int64 tokens; a negative label stands for token 0.
        ids: (..., k) int64 tokens.
        temperature: divides the logits.
        softcap: final logit soft-cap, for logits that were taken before the model's own capping.
        share_grad: add the gradient in place to the one that ``logits`` gets from elsewhere, for example from the
            log-probs of the labels. It saves the memory of a second gradient of this size, and most of the time of this
            function's backward pass. It is an error if there is no other gradient.

    Returns:
        (..., k) nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: if an option is invalid.
    """
    options = row_options(temperature, softcap, None, "auto", None)
    tokens = torch.cat([ids.long(), labels.clamp_min(0).unsqueeze(-1)], -1)
    found = (selected_logits_shared if share_grad else selected_logits)(logits, tokens)
    found = scaled(found.to(torch.promote_types(found.dtype, torch.float32)), options.scale, options.softcap)
    return found[..., :-1] - found[..., -1:]


@torch.no_grad()
def reference_of(
    ids: Tensor, log_probs: Tensor, vocabulary: int, *, temperature: float = 1.0, draws: Draws | None = None
) -> RefTopK:
    """Return what ``top:`` needs of a reference whose log-probs are known.

    Args:
        ids: (..., k) int64, the reference's most probable tokens.
        log_probs: (..., k) log-probs of these tokens under the reference, nats, float32 or float64; with ``draws``
            (..., k + m), those of the draws after them.
        vocabulary: number of tokens in the vocabulary.
        temperature: the number by which the reference's logits were divided.
        draws: result of :func:`top_and_drawn_tokens` for the same positions.

    Returns:
        The log of the tail is that of 1 minus the sum over the k tokens, at least that of 2**-24.
    """
    k = ids.shape[-1]
    log_probs, drawn = log_probs[..., :k].clamp_max(0.0), log_probs[..., k:].clamp_max(0.0)
    log_tail = log_of_tail(log_probs)
    if k >= vocabulary:
        log_tail = torch.full_like(log_tail, -torch.inf)
    given = None if draws is None else RefDraws(draws.ids, drawn, draws.log_rate, draws.label_log_rate)
    return RefTopK(ids, log_probs, log_tail, temperature, given)


def top_k_kl(
    log_probs: Tensor,
    logp: Tensor,
    labels: Tensor,
    *,
    reference: RefTopK,
    ref_logp: Tensor,
    mask: Tensor | None = None,
) -> TopKKL:
    """Compute KL(policy || reference) over the reference's k tokens and one bucket for all others.

    See ``docs/exact.md`` for the form and its accuracy. The bucket's probability is 1 minus the sum over the k tokens,
    with an absolute error of about 1e-6 if the log-probs are float32.

    If the reference has draws, ``kl`` includes their estimate of the KL inside the bucket. Then it is unbiased together
    with the label's remainder, and a single value can be negative.

    Args:
        log_probs: (..., k) log-probs of ``reference.tokens`` under the policy, nats, with their graph: for example
            ``log_odds(logits, labels, reference.tokens) + logp.unsqueeze(-1)``; (..., k + m) with draws. 16 bits are
            refused, because their rounding is often larger than the bucket.
        logp: (...) log-probs of the labels under the policy, nats.
        labels: (...) int64 tokens; -100 leaves a position out.
        reference: result of :func:`kl_plugins.reference_top_k` or :func:`reference_of` for the same positions and the
            same temperature.
        ref_logp: (...) log-probs of the labels under the reference, nats.
        mask: (...) True for positions to use. All other positions give 0 and no gradient, even if they hold NaN.

    Returns:
        Each (...), nats, in the dtype of ``log_probs``. kl is differentiable; ``logp`` and ``ref_logp`` are the
        arguments.

    Raises:
        ValueError: if a shape is invalid.
        TypeError: if a dtype is not supported.
    """
    shape = logp.shape
    check_floats(log_probs=log_probs, logp=logp)
    if log_probs.element_size() < 4:
        raise TypeError(f"log_probs hold {log_probs.dtype}, expected float32 or float64; pass the logits to exact_kl")
    draws, expected = reference.draws, tuple(reference.tokens.shape)
    if log_probs.shape != expected:
        raise ValueError(f"log_probs {tuple(log_probs.shape)} must be {expected}, like reference.tokens")
    labels = checked_labels(labels, mask, shape).reshape(-1)
    options = row_options(reference.temperature, None, None, "auto", None)
    given = TopKReference(*checked_reference(reference, ref_logp, labels, shape, options))
    by_row = None if draws is None else draws.rows()
    found = kl_of_log_probs(flat_rows(log_probs), logp.reshape(-1), labels, labels != IGNORE_INDEX, given, by_row)
    return TopKKL(found.kl.reshape(shape), logp, ref_logp, found.remainder.detach().reshape(shape))
