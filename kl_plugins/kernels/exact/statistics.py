"""The statistics that every backend computes per row, and how the sums of one pass become a KL without cancellation.

z and u are the scaled (and soft-capped) logits of policy and reference, p = softmax(z), and d = z - u - c for a row's
shift c. A pass over the vocabulary computes x = E_p[d], y = E_p[k3(d)] with k3(d) = exp(-d) - 1 + d, and
R = E_p[exp(-d)]. With w = y - x = R - 1,

    KL(p || ref) = x + log R = y - (w - log1p(w)).

The second form contains no difference of log-sum-exps: the number that it subtracts is of second order in d, like the
KL itself. The second form is used for small divergences, the first form for large ones.

Both forms multiply the rounding errors of the terms by (c - E_p[z - u])^2 / KL, so k3(d) must fit p and d to the last
digit. For this reason the exponents below are differences of nearby numbers, which float32 holds exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.numerics import LINEAR_LIMIT

IGNORE_INDEX = -100
"""Rows with this label give 0 and no gradient, even if their logits are NaN or infinite."""

AMPLIFICATION = 48.0
"""Rows whose sums are more than this many times larger than the resulting KL are computed again in float64."""

OFFSET = 80.0
"""Rows whose E_p[z - u] is more than this many times the spread of z - u are computed again in float64.

Float32 rounds z - u with a relative error of 6e-8. A difference that all tokens have in common adds nothing to the KL,
but its rounding errors do.
"""

SMALLEST_PROMISED = 1e-5
"""The KL (nats) from which the promised accuracy holds."""

NEGLIGIBLE = 1e-9
"""Below this KL (nats), relative precision is not needed."""


class Rows(NamedTuple):
    """The inputs of a backend.

    Attributes:
        logits, ref_logits: (N, V), any float dtype; policy and reference.
        labels: (N,) int64; :data:`IGNORE_INDEX` marks rows to leave out.
    """

    logits: Tensor
    ref_logits: Tensor
    labels: Tensor

    def at(self, index: Tensor | slice) -> Rows:
        """Return the selected rows."""
        return Rows(self.logits[index], self.ref_logits[index], self.labels[index])


class Upstream(NamedTuple):
    """Upstream gradients of each row's KL and label log-prob, both (N,)."""

    kl: Tensor
    logp: Tensor

    def at(self, index: Tensor | slice) -> Upstream:
        """Return the upstream gradients of the selected rows."""
        return Upstream(self.kl[index], self.logp[index])


class RowStatistics(NamedTuple):
    """Statistics per row, all (N,), float32 (float64 for float64 logits), 0 in ignored rows.

    Attributes:
        kl: KL(policy || reference), nats, in [0, 1e4].
        logp: log-prob of the label under the policy, nats, at least -1e4.
        ref_logp: log-prob of the label under the reference, nats, at least -1e4.
        lse: log-sum-exp of the policy's scaled logits.
        centre: E_p[z - u], always float64. Float32 holds it exactly, except in rows that have an :func:`offset`, whose
            gradient is computed in float64 too (see :func:`needs_float64`).
    """

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor
    lse: Tensor
    centre: Tensor

    def at(self, index: Tensor | slice) -> RowStatistics:
        """Return the statistics of the selected rows."""
        return RowStatistics(*(part[index] for part in self))

    def double(self) -> RowStatistics:
        """Return the statistics in float64."""
        return RowStatistics(*(part.double() for part in self))


class RowSums(NamedTuple):
    """The sums of one pass over the vocabulary, all (N,). Parts of a vocabulary that share ``shift`` can be merged.

    Attributes:
        maximum: m = max z.
        mass: sum of e = exp(z - m).
        first: sum of e d.
        second: sum of e k3(d), computed as r - e + e d with r = exp(u + c - m), so that it includes the reference's
            mass on tokens without policy mass.
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


def finish(
    sums: RowSums, labels: Tensor, dtype: torch.dtype, ref_lse: Tensor | None = None
) -> tuple[RowStatistics, Tensor]:
    """Compute statistics from sums, in float64 per row.

    Args:
        sums: sums of whole rows.
        labels: (N,) int64; :data:`IGNORE_INDEX` marks rows to leave out.
        dtype: dtype of the statistics.
        ref_lse: (N,) log-sum-exp of u + c, for backends that use a separate maximum for the reference. Unlike
            ``sums.ref_mass``, it cannot overflow.

    Returns:
        Statistics, and a bool (N,): the rows whose KL may have lost digits, or that overflowed. They must be computed
        again (see :mod:`kl_plugins.kernels.exact.precise`).
    """
    single = sums.shift.dtype != torch.float64
    maximum, mass, first, second, ref_mass, shift, label, ref_label = (part.double() for part in sums)
    x, y = first / mass, second / mass
    lse = maximum + mass.log()
    log_ref_mass = (ref_mass / mass).log() if ref_lse is None else ref_lse.double() - lse
    w = y - x
    second_order = w - torch.log1p(w)
    # small and large are two forms of the same KL. The loss of a form is the size of the numbers that were rounded. The
    # form with the smaller loss is used, and NaN counts as an infinite loss. The derivatives of small are 1 / (1 + w)
    # with respect to y and w / (1 + w) with respect to x. So it loses all digits where R = 1 + w is near 0, and, in the
    # float64 of these lines, where R is huge.
    small, large = y - second_order, x + log_ref_mass
    here = torch.finfo(torch.float64).eps / torch.finfo(sums.shift.dtype).eps
    loses_small = torch.where(w > -1.0, (y.abs() + (x * w).abs()) / (1.0 + w) + y.abs() * here, torch.inf)
    loses_small = loses_small.nan_to_num(torch.inf)
    loses_large = (x.abs() + 2.0 + 0.0 * log_ref_mass).nan_to_num(torch.inf)
    kl = torch.where(loses_small <= loses_large, small, large)
    lost = torch.minimum(loses_small, loses_large)
    # The condition is negated so that NaN counts as doubtful.
    doubtful = ~((lost <= AMPLIFICATION * kl.abs() + NEGLIGIBLE) & log_ref_mass.isfinite() & lse.isfinite())
    centre = x + shift
    if single:
        doubtful |= offset(centre, kl, 1.0 / mass)
        centre = centre.float().double()
    found = saturated(kl, label - lse, ref_label + shift - lse - log_ref_mass, lse, centre, dtype)
    kept = labels != IGNORE_INDEX
    return RowStatistics(*(part.masked_fill(~kept, 0.0) for part in found)), doubtful & kept


def saturated(
    kl: Tensor, logp: Tensor, ref_logp: Tensor, lse: Tensor, centre: Tensor, dtype: torch.dtype
) -> RowStatistics:
    """Clamp infinite divergences and log-probs to the documented range. NaN stays NaN, so that it is not hidden."""
    largest = torch.finfo(dtype).max
    return RowStatistics(
        kl.clamp(0.0, LINEAR_LIMIT).to(dtype),
        logp.clamp(-LINEAR_LIMIT, 0.0).to(dtype),
        ref_logp.clamp(-LINEAR_LIMIT, 0.0).to(dtype),
        lse.clamp(-largest, largest).to(dtype),
        centre.clamp(-LINEAR_LIMIT, LINEAR_LIMIT),
    )


def offset(centre: Tensor, kl: Tensor, largest_p: Tensor) -> Tensor:
    """Return a bool (N,): rows where all tokens share such a large z - u that float32 rounds away the differences.

    If one token has nearly all of the mass, its z - u is not counted as an offset of the other tokens.
    """
    common = centre.abs() * (1.0 - largest_p).clamp_min(0.0).sqrt()
    return common > OFFSET * (2.0 * kl.clamp_min(SMALLEST_PROMISED)).sqrt()


def needs_float64(statistics: RowStatistics) -> Tensor:
    """Return a bool (N,): rows with an :func:`offset`, whose gradient float32 cannot compute."""
    return statistics.centre != statistics.centre.to(statistics.lse.dtype)


def different_caps(options: Options) -> bool:
    """Return whether policy and reference have different soft-caps: z - u is then a difference of rounded numbers."""
    return options.softcap != options.ref_softcap


def working_dtype(logits: Tensor, options: Options) -> torch.dtype:
    """Return the dtype in which terms are computed: float32, but float64 for float64 logits or different soft-caps."""
    return torch.float64 if different_caps(options) else torch.promote_types(logits.dtype, torch.float32)


def scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return z = scale * cap * tanh(logits / cap). The cap is part of the model, so it comes before the temperature."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return times(logits, scale)


def log_ratio(logits: Tensor, ref_logits: Tensor, options: Options) -> Tensor:
    """Return z - u, clamped to 1e4 nats, and 0 where z is -inf.

    The difference is taken before scale and cap, because their rounding errors would be as large as a small difference.
    """
    scale, softcap, ref_softcap = options[:3]
    if softcap is not None and softcap == ref_softcap:
        # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
        one, other = torch.tanh(logits / softcap), torch.tanh(ref_logits / softcap)
        difference = softcap * torch.tanh((logits - ref_logits) / softcap) * (1 - one * other)
    else:
        difference = scaled(logits, 1.0, softcap) - scaled(ref_logits, 1.0, ref_softcap)
    if scale != 1.0:
        difference = difference * scale
    difference = difference.clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    # A capped logit is finite, even if the model's logit is infinite.
    return difference if softcap is not None else difference.masked_fill(logits == -torch.inf, 0.0)


def k3(d: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d for d between -1/2 and 1/2, exact to the last digit."""
    if d.dtype == torch.float64:
        return torch.expm1(-d) + d
    # The coefficients are literals, because the compiler would treat numbers in a module-level table as inputs that may
    # change.
    tail = 1 / 120 - d * (1 / 720 - d * (1 / 5040 - d * (1 / 40320)))
    return d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * tail)))


class Options(NamedTuple):
    """The options that are the same for every row of a call.

    Attributes:
        scale: 1 / temperature.
        softcap, ref_softcap: soft-caps of the models' final logits, None for no soft-cap.
        backend: name of a backend, as in :func:`~kl_plugins.kernels.exact.backends.exact_backend`.
        tile_bytes: bound on temporaries, in bytes; None for the backend's default.
    """

    scale: float = 1.0
    softcap: float | None = None
    ref_softcap: float | None = None
    backend: str = "auto"
    tile_bytes: int | None = None


class LabelLogits(NamedTuple):
    """The label of each row, (N,): z and u (float64), and their difference by :func:`log_ratio`, the shift c."""

    label: Tensor
    ref_label: Tensor
    shift: Tensor


def label_logits(rows: Rows, options: Options) -> LabelLogits:
    """Return the labels' logits and the shift from them. With this shift, d is small where the policies are close."""
    index = rows.labels.clamp_min(0)[:, None]
    label, ref_label = (x.gather(-1, index)[:, 0].double() for x in (rows.logits, rows.ref_logits))
    return LabelLogits(
        scaled(label, options.scale, options.softcap),
        scaled(ref_label, options.scale, options.ref_softcap),
        log_ratio(label, ref_label, options).to(working_dtype(rows.logits, options)),
    )


def row_sums(
    logits: Tensor,
    ref_logits: Tensor,
    shift: Tensor,
    options: Options,
    top: Tensor | None = None,
    accumulator: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Compute the sums of one pass over rows, in the dtype of the shift.

    Args:
        logits, ref_logits: (N, V), any float dtype; policy and reference.
        shift: (N,) c, finite, in :func:`working_dtype`.
        options: options for all rows.
        top: (N,) largest soft-capped logit of the policy in the whole row; needed if ``logits`` holds parts of rows.
        accumulator: dtype of the sums. The default is the dtype of the terms, which is accurate only if torch adds in
            pairs or in a tree.

    Returns:
        The first six fields of :class:`RowSums`. The shift may differ from the given shift by a rounding error.
    """
    dtype, scale = shift.dtype, options.scale
    # The temperature is applied last, because differences of nearby logits are exact before it.
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    z, u = scaled(logits, 1.0, options.softcap), scaled(ref_logits, 1.0, options.ref_softcap)
    top = z.amax(-1, keepdim=True) if top is None else top[:, None]
    moved, shift = aligned(shift[:, None], top, scale)
    d = log_ratio(logits, ref_logits, options) - shift
    e = torch.exp(times(z - top, scale))
    if options.softcap is None or different_caps(options):
        r = torch.exp(times(u + moved, scale))
    else:
        # d is more accurate than z and u, which the cap rounds. r must be consistent with e and d.
        fitting = d.abs() < LINEAR_LIMIT / 2
        r = torch.exp(torch.where(fitting, times(z - top, scale) - d, times(u + moved, scale)))
    # Where e = 0, the policy excludes the token, and the term is the reference's mass there.
    second = torch.where((d.abs() < 0.5) & (e > 0), e * k3(d), r - e + e * d)
    sums = (terms.sum(-1, dtype=accumulator) for terms in (e, e * d, second, r))
    return top[:, 0].double() * scale, *sums, shift[:, 0]


def aligned(shift: Tensor, top: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return c / scale - top as a rounded number, and the c that fits it exactly.

    With any other c, every r of the row would have the same relative error.
    """
    moved = shift / scale - top
    exact = times(moved + top, scale)
    return moved, torch.where(exact.isfinite(), exact, shift)


def times(x: Tensor, scale: float) -> Tensor:
    """Return ``x * scale``, without a pass over memory if the scale is 1."""
    return x if scale == 1.0 else x * scale


def whole_rows(parts: tuple[Tensor, ...], label: LabelLogits) -> RowSums:
    """Return the sums of whole rows from the results of :func:`row_sums` and :func:`label_logits`."""
    maximum, mass, first, second, ref_mass, shift = parts
    return RowSums(maximum, mass, first, second, ref_mass, shift, label.label, label.ref_label)
