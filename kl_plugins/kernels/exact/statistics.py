"""What every backend computes per row, and how the sums of one pass become a KL without cancellation.

z and u are the scaled (and soft-capped) logits of policy and reference, p = softmax(z), and d = z - u - c for a row's
shift c. A pass over the vocabulary leaves x = E_p[d], y = E_p[k3(d)], k3(d) = exp(-d) - 1 + d, and R = E_p[exp(-d)].
With w = y - x = R - 1,

    KL(p || ref) = x + log R = y - (w - log1p(w)).

The second form holds no difference of log-sum-exps: what it subtracts is of second order in d, like KL itself. It
serves small divergences, the first large ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.numerics import LINEAR_LIMIT

IGNORE_INDEX = -100
"""Rows with this label give 0 and no gradient, whatever their logits hold."""

AMPLIFICATION = 32.0
"""Rows whose sums are this many times larger than the KL that is left of them are computed again in float64."""

NEGLIGIBLE = 1e-9
"""Below this size (nats) a loss of digits is nobody's concern."""


class RowStatistics(NamedTuple):
    """Per row, all (N,), float32 (float64 for float64 logits), 0 in ignored rows.

    Attributes:
        kl: KL(policy || reference), nats, in [0, 1e4].
        logp: log-prob of the label under the policy, nats, at least -1e4.
        ref_logp: the same under the reference.
        lse: log-sum-exp of the policy's scaled logits.
        centre: E_p[z - u].
    """

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor
    lse: Tensor
    centre: Tensor


class RowSums(NamedTuple):
    """What one pass over the vocabulary leaves, all (N,). Mergeable over parts of a vocabulary that share ``shift``.

    Attributes:
        maximum: m = max z.
        mass: sum of e = exp(z - m).
        first: sum of e d.
        second: sum of e k3(d), read as r - e + e d with r = exp(u + c - m), so that tokens without policy mass count.
        ref_mass: sum of r.
        shift: c.
        label: z of the label.
        ref_label: u of the label.
    """

    maximum: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor
    ref_mass: Tensor
    shift: Tensor
    label: Tensor
    ref_label: Tensor


def finish(sums: RowSums, labels: Tensor, ref_lse: Tensor | None = None) -> tuple[RowStatistics, Tensor]:
    """Turn sums into statistics, in float64 per row.

    Args:
        sums: of whole rows.
        labels: (N,) int64; :data:`IGNORE_INDEX` marks rows to leave out.
        ref_lse: (N,) log-sum-exp of u + c, for backends that keep a maximum of their own for it: unlike
            ``sums.ref_mass`` it cannot overflow.

    Returns:
        Statistics in the dtype of the shift, and a bool (N,): rows whose KL may have lost digits, or that overflowed,
        and that have to be computed again (see :mod:`kl_plugins.kernels.exact.precise`).
    """
    dtype = sums.shift.dtype
    maximum, mass, first, second, ref_mass, shift, label, ref_label = (part.double() for part in sums)
    x, y = first / mass, second / mass
    lse = maximum + mass.log()
    log_ref_mass = (ref_mass / mass).log() if ref_lse is None else ref_lse.double() - lse
    w = y - x
    second_order = w - torch.log1p(w)
    # Two forms of one number, each with the size of what was rounded: the one that loses less is taken; NaN loses all.
    # The derivatives of the first are 1 / (1 + w) by y and w / (1 + w) by x: it loses all where R = 1 + w nears 0.
    small, large = y - second_order, x + log_ref_mass
    loses_small = torch.where(w > -1.0, (y.abs() + (x * w).abs()) / (1.0 + w), torch.inf).nan_to_num(torch.inf)
    loses_large = (x.abs() + 2.0 + 0.0 * log_ref_mass).nan_to_num(torch.inf)
    kl = torch.where(loses_small <= loses_large, small, large)
    lost = torch.minimum(loses_small, loses_large)
    # Written so that NaN counts as doubtful.
    doubtful = ~((lost <= AMPLIFICATION * kl.abs() + NEGLIGIBLE) & log_ref_mass.isfinite() & lse.isfinite())
    found = saturated(kl, label - lse, ref_label + shift - lse - log_ref_mass, lse, x + shift, dtype)
    kept = labels != IGNORE_INDEX
    return RowStatistics(*(part.masked_fill(~kept, 0.0) for part in found)), doubtful & kept


def saturated(
    kl: Tensor, logp: Tensor, ref_logp: Tensor, lse: Tensor, centre: Tensor, dtype: torch.dtype
) -> RowStatistics:
    """Bring infinite divergences and log-probs into range; NaN stays NaN, to be seen."""
    largest = torch.finfo(dtype).max
    return RowStatistics(
        kl.clamp(0.0, LINEAR_LIMIT).to(dtype),
        logp.clamp(-LINEAR_LIMIT, 0.0).to(dtype),
        ref_logp.clamp(-LINEAR_LIMIT, 0.0).to(dtype),
        lse.clamp(-largest, largest).to(dtype),
        centre.clamp(-LINEAR_LIMIT, LINEAR_LIMIT).to(dtype),
    )


def scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """z = scale * cap * tanh(logits / cap): the cap belongs to the model, so it comes before the temperature."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if scale == 1.0 else logits * scale


def log_ratio(
    logits: Tensor, ref_logits: Tensor, scale: float, softcap: float | None, ref_softcap: float | None
) -> Tensor:
    """z - u, saturated at 1e4 nats, and 0 where the policy's logit is -inf.

    The difference comes before scale and cap, whose roundings would be as large as a small difference.
    """
    if softcap is not None and softcap == ref_softcap:
        # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
        one, other = torch.tanh(logits / softcap), torch.tanh(ref_logits / softcap)
        difference = softcap * torch.tanh((logits - ref_logits) / softcap) * (1 - one * other)
    else:
        difference = scaled(logits, 1.0, softcap) - scaled(ref_logits, 1.0, ref_softcap)
    if scale != 1.0:
        difference = difference * scale
    return difference.clamp(-LINEAR_LIMIT, LINEAR_LIMIT).masked_fill(logits == -torch.inf, 0.0)


def k3(d: Tensor) -> Tensor:
    """exp(-d) - 1 + d for d between -1/2 and 1/2, to the last digit."""
    if d.dtype == torch.float64:
        return torch.expm1(-d) + d
    # Literals: the compiler would take numbers from a module's table for inputs that may change.
    tail = 1 / 120 - d * (1 / 720 - d * (1 / 5040 - d * (1 / 40320)))
    return d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * tail)))


class Options(NamedTuple):
    """What is the same in all rows.

    Attributes:
        scale: 1 / temperature.
        softcap, ref_softcap: the models' final logit soft-caps, None for none.
    """

    scale: float
    softcap: float | None
    ref_softcap: float | None


class LabelLogits(NamedTuple):
    """Of each row's label, (N,): z, u, and their difference as :func:`log_ratio` has it, which is the shift c."""

    label: Tensor
    ref_label: Tensor
    shift: Tensor


def label_logits(logits: Tensor, ref_logits: Tensor, labels: Tensor, options: Options) -> LabelLogits:
    """Read the labels' logits: d around them is small wherever the policies are close."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    index = labels.clamp_min(0)[:, None]
    label, ref_label = (x.gather(-1, index)[:, 0].to(dtype) for x in (logits, ref_logits))
    return LabelLogits(
        scaled(label, options.scale, options.softcap),
        scaled(ref_label, options.scale, options.ref_softcap),
        log_ratio(label, ref_label, *options),
    )


def row_sums(
    logits: Tensor,
    ref_logits: Tensor,
    shift: Tensor,
    options: Options,
    maximum: Tensor | None = None,
    accumulator: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """One pass over whole rows, in float32 (float64 for float64 logits).

    Args:
        logits, ref_logits: (N, V), any float dtype; policy and reference.
        shift: (N,) c, finite.
        options: for all rows.
        maximum: (N,) max z over whole rows, where these are parts of them.
        accumulator: dtype that sums are held in; by default that of the terms, which needs sums by pairs or trees.

    Returns:
        The first five fields of :class:`RowSums`.
    """
    dtype, shift = shift.dtype, shift[:, None]
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    z, u = scaled(logits, options.scale, options.softcap), scaled(ref_logits, options.scale, options.ref_softcap)
    d = log_ratio(logits, ref_logits, *options) - shift
    maximum = z.amax(-1, keepdim=True) if maximum is None else maximum[:, None]
    e, r = torch.exp(z - maximum), torch.exp(u + (shift - maximum))
    # e = 0: the policy excludes the token, and what counts is the reference's mass there.
    second = torch.where((d.abs() < 0.5) & (e > 0), e * k3(d), r - e + e * d)
    return maximum[:, 0], *(terms.sum(-1, dtype=accumulator) for terms in (e, e * d, second, r))


def whole_rows(parts: tuple[Tensor, ...], label: LabelLogits) -> RowSums:
    """Sums of whole rows from what :func:`row_sums` and :func:`label_logits` return."""
    maximum, mass, first, second, ref_mass = parts
    return RowSums(maximum, mass, first, second, ref_mass, label.shift, label.label, label.ref_label)
