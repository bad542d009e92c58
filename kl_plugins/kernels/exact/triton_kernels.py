"""Triton kernels of the exact KL: the statistics of a row in one pass over the vocabulary, the gradient in another.

The formulas are those of :mod:`kl_plugins.kernels.exact.statistics`. No function of libdevice is called by name. These
functions do not exist in Triton's interpreter, and their names differ between versions of Triton.

A block of a row is a tensor of shape (repeats, lanes, vector). A thread holds whole lanes: ``repeats`` times ``vector``
neighbouring logits, which one instruction loads. Each lane has its own maximum and sums, so the threads do not wait
for each other before the row ends.
"""

# This file has no ``from __future__ import annotations``, because Triton reads the annotations of its kernels.

import torch
import triton
import triton.language as tl

from kl_plugins.kernels.exact.statistics import IGNORE_INDEX as _IGNORE_INDEX
from kl_plugins.numerics import LINEAR_LIMIT as _LINEAR_LIMIT

LOG2_E = tl.constexpr(1.4426950408889634)
LINEAR_LIMIT = tl.constexpr(_LINEAR_LIMIT)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
IGNORE_INDEX = tl.constexpr(_IGNORE_INDEX)
OUTLIER = tl.constexpr(1.7)
"""A second pass over a row follows if E[d]^2 is more than this many times E[k3(d)].

The ratio is 2 in a row without any divergence.
"""


@triton.jit
def _tanh(x):
    # 1 - e^(-2|x|) loses the digits of a small x, and the difference of two logits is a small x. A series is used then.
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.09, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _parted(z, cap):
    """Return a soft-capped logit and its two parts: a number whose differences are exact, and a small rest."""
    # cap tanh x is the sum of the logit and a rest, and only the rest is rounded. The rest of x / 4 comes from its
    # series. Then tanh 2y - 2y = 2 ((tanh y - y) - y tanh^2 y) / (1 + tanh^2 y) is applied twice; its terms have one
    # sign.
    y = z / cap * 0.25
    square = y * y
    rest = y * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    for _ in tl.static_range(2):
        square = (y + rest) * (y + rest)
        rest = 2.0 * (rest - y * square) / (1.0 + square)
        y = 2.0 * y
    small = tl.abs(y) < 1.2
    main, rest = tl.where(small, z, _tanh(y) * cap), tl.where(small, rest * cap, 0.0)
    return main + rest, main, rest


@triton.jit
def _capped(
    z, u, scale, cap, ref_cap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
):  # fmt: skip
    """Return the soft-capped logits before the temperature, and their difference after it."""
    if SAME_CAP:
        # With tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b), the difference keeps its digits.
        t, ref_t = _tanh(z / cap), _tanh(u / cap)
        difference = tl.where(z == u, 0.0, _tanh((z - u) / cap) * (1.0 - t * ref_t)) * (cap * scale)
        z, u = t * cap, ref_t * cap
    elif CAPPED or REF_CAPPED:
        main, ref_main, rest, ref_rest = z, u, 0.0, 0.0
        if CAPPED:
            z, main, rest = _parted(z, cap)
        if REF_CAPPED:
            u, ref_main, ref_rest = _parted(u, ref_cap)
        difference = ((main - ref_main) + (rest - ref_rest)) * scale
    else:
        difference = z - u  # Before the temperature, the difference of nearby logits is exact.
        if SCALED:
            difference = difference * scale
    # Both minimum and maximum return the number if the other operand is NaN, so -inf minus -inf becomes finite too.
    return z, u, tl.minimum(tl.maximum(difference, -LINEAR_LIMIT), LINEAR_LIMIT)


@triton.jit
def _columns(REPEATS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns of the first block of a row, (repeats, lanes, vector)."""
    repeat = tl.arange(0, REPEATS)[:, None, None] * (LANES * VECTOR)
    return repeat + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _over_lane(x):
    """Sum over all dimensions except the lanes, within each thread."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _add_block(
    z_row, u_row, columns, vocab, max_z, max_u, s, a, y, r, scale, shift, cap, ref_cap,
    MASKED: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
):  # fmt: skip
    """Add one block of the vocabulary to the sums of each lane."""
    if MASKED:
        inside = columns < vocab
        z = tl.load(z_row + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_row + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_row + columns).to(tl.float32)
        u = tl.load(u_row + columns).to(tl.float32)
    z, u, difference = _capped(z, u, scale, cap, ref_cap, SCALED, CAPPED, REF_CAPPED, SAME_CAP)
    if MASKED:  # With -inf, e and f are 0, and so is every term.
        z, u = tl.where(inside, z, float("-inf")), tl.where(inside, u, float("-inf"))

    top = tl.maximum(max_z, tl.max(tl.max(z, 2), 0))
    ref_top = tl.maximum(max_u, tl.max(tl.max(u, 2), 0))
    exponent_scale = scale * LOG2_E
    shrink, ref_shrink = tl.exp2((max_z - top) * exponent_scale), tl.exp2((max_u - ref_top) * exponent_scale)
    top_exponent, ref_exponent = top * exponent_scale, ref_top * exponent_scale
    e = tl.exp2(z * exponent_scale - top_exponent[None, :, None])
    f = tl.exp2(u * exponent_scale - ref_exponent[None, :, None])
    d = difference - shift  # d is finite: where the policy has no mass, e d is 0, and f keeps the reference's mass
    ed = e * d
    # k3(d) = e^-d - 1 + d. Where the three terms would cancel, its Taylor series is used. Elsewhere e e^-d is f,
    # rescaled.
    series = 1 / 2 + d * (-1 / 6 + d * (1 / 24 + d * (-1 / 120 + d * (1 / 720 + d * (-1 / 5040 + d * (1 / 40320 + d * (-1 / 362880)))))))  # fmt: skip # noqa: E501
    rescale = tl.exp2(shift * LOG2_E + (ref_exponent - top_exponent))  # the difference of nearby numbers is exact
    reference = f * rescale[None, :, None]
    if CAPPED or REF_CAPPED:
        # The cap rounds z and u, but not d. The reference's term must be consistent with e and d.
        reference = tl.where((e > 0) & (tl.abs(d) < 60.0), e * tl.exp2(-d * LOG2_E), reference)
    ek3 = tl.where(tl.abs(d) < 1.0, ed * d * series, reference - e + ed)
    s, a = s * shrink + _over_lane(e), a * shrink + _over_lane(ed)
    return top, ref_top, s, a, y * shrink + _over_lane(ek3), r * ref_shrink + _over_lane(f)


@triton.jit
def _row_sums(
    z_row, u_row, vocab, top, ref_top, scale, shift, cap, ref_cap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
    REPEATS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute maxima and sums of one row, or of some columns of it, with a shift."""
    block: tl.constexpr = REPEATS * LANES * VECTOR
    columns = _columns(REPEATS, LANES, VECTOR)
    # The maxima start at the label's logits. If they started at -inf, a first block without policy mass would lose the
    # reference's mass.
    max_z, max_u = tl.zeros([LANES], tl.float32) + top, tl.zeros([LANES], tl.float32) + ref_top
    s, a = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    y, r = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    whole = vocab // block * block
    for start in tl.range(0, whole, block, num_stages=STAGES):
        max_z, max_u, s, a, y, r = _add_block(
            z_row, u_row, start + columns, vocab, max_z, max_u, s, a, y, r, scale, shift, cap, ref_cap,
            False, SCALED, CAPPED, REF_CAPPED, SAME_CAP,
        )  # fmt: skip
    if whole < vocab:
        max_z, max_u, s, a, y, r = _add_block(
            z_row, u_row, whole + columns, vocab, max_z, max_u, s, a, y, r, scale, shift, cap, ref_cap,
            True, SCALED, CAPPED, REF_CAPPED, SAME_CAP,
        )  # fmt: skip
    top, ref_top = tl.max(max_z, 0), tl.max(max_u, 0)
    shrink, ref_shrink = tl.exp2((max_z - top) * (scale * LOG2_E)), tl.exp2((max_u - ref_top) * (scale * LOG2_E))
    s, a, y, r = tl.sum(s * shrink, 0), tl.sum(a * shrink, 0), tl.sum(y * shrink, 0), tl.sum(r * ref_shrink, 0)
    return top, ref_top, s, a, y, r


@triton.jit
def row_sums_kernel(
    z_ptr, u_ptr, labels_ptr, label_ptr, ref_label_ptr, shift_ptr, sums_ptr,
    z_stride, u_stride, rows, vocab, scale, cap, ref_cap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
    REPEATS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the maxima and sums of some columns of a row to ``sums_ptr``, (6, rows); one program per row.

    The order is: maximum, reference maximum, mass, first, second, reference mass.
    """
    row = tl.program_id(0).to(tl.int64)
    sums = sums_ptr + row
    if tl.load(labels_ptr + row) != IGNORE_INDEX:  # The logits of an ignored row are never read.
        top = tl.maximum(tl.load(label_ptr + row) / scale, -1e30)
        ref_top = tl.maximum(tl.load(ref_label_ptr + row) / scale, -1e30)
        top, ref_top, s, a, y, r = _row_sums(
            z_ptr + row * z_stride, u_ptr + row * u_stride, vocab, top, ref_top, scale, tl.load(shift_ptr + row),
            cap, ref_cap, SCALED, CAPPED, REF_CAPPED, SAME_CAP, REPEATS, LANES, VECTOR, STAGES,
        )  # fmt: skip
        tl.store(sums, top)
        tl.store(sums + rows, ref_top)
        tl.store(sums + 2 * rows, s)
        tl.store(sums + 3 * rows, a)
        tl.store(sums + 4 * rows, y)
        tl.store(sums + 5 * rows, r)
    else:
        for part in tl.static_range(6):
            tl.store(sums + part * rows, 0.0)


@triton.jit
def _tanh64(x):
    decay = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)


@triton.jit
def _within(x, least, largest):
    """Clamp a number to a range. NaN stays NaN, so that it is not hidden."""
    return tl.where(x < least, least, tl.where(x > largest, largest, x))


@triton.jit
def _at_label(
    z, u, scale, cap, ref_cap,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
):  # fmt: skip
    """Compute the label's scaled logits and the shift from float64 logits: see ``label_logits``."""
    difference = z - u
    if SAME_CAP:
        difference = _tanh64(difference / cap) * (1.0 - _tanh64(z / cap) * _tanh64(u / cap)) * cap
    elif not (CAPPED or REF_CAPPED):
        difference = tl.where(z == float("-inf"), 0.0, difference)
    if CAPPED:
        z = _tanh64(z / cap) * cap
    if REF_CAPPED:
        u = _tanh64(u / ref_cap) * ref_cap
    if (CAPPED or REF_CAPPED) and not SAME_CAP:
        difference = z - u
    return z * scale, u * scale, _within(difference * scale, -LINEAR_LIMIT, LINEAR_LIMIT).to(tl.float32)


@triton.jit
def _finished(top, ref_top, s, a, y, r, shift, label, ref_label, scale):
    """Compute KL, log-probs of the label, log-sum-exp and centre in float64: see ``finish``."""
    lse = top.to(tl.float64) * scale + tl.log(s.to(tl.float64))
    ref_lse = ref_top.to(tl.float64) * scale + tl.log(r.to(tl.float64))
    x, y = a.to(tl.float64) / s.to(tl.float64), y.to(tl.float64) / s.to(tl.float64)
    w = y - x
    # log1p is computed from the logarithm: the rounding of 1 + w is divided out again.
    one = 1.0 + w
    log1p = tl.where(one == 1.0, w, tl.log(one) * (w / (one - 1.0)))
    small = y - (w - log1p)
    large = x + (ref_lse + shift - lse)
    loses_small = tl.where(w > -1.0, (tl.abs(y) + tl.abs(x * w)) / one + tl.abs(y) * 1.9e-9, float("inf"))
    kl = tl.where(loses_small <= tl.abs(x) + 2.0, small, large)
    return kl, label - lse, ref_label - ref_lse, lse, (x + shift).to(tl.float32)


@triton.jit
def statistics_kernel(
    z_ptr, u_ptr, labels_ptr, statistics_ptr, centre_ptr,
    z_stride, u_stride, rows, vocab, scale, cap, ref_cap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
    REPEATS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write kl, logp, ref_logp and lse to ``statistics_ptr``, (4, rows), and the centre; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    z_row, u_row = z_ptr + row * z_stride, u_ptr + row * u_stride
    label = tl.load(labels_ptr + row)
    found, centre = statistics_ptr + row, centre_ptr + row
    if label != IGNORE_INDEX:  # The logits of an ignored row are never read.
        known = (label >= 0) & (label < vocab)  # The caller raises for other labels.
        z = tl.load(z_row + label, mask=known, other=0.0).to(tl.float64)
        u = tl.load(u_row + label, mask=known, other=0.0).to(tl.float64)
        label_z, label_u, shift = _at_label(z, u, scale, cap, ref_cap, CAPPED, REF_CAPPED, SAME_CAP)
        start, ref_start = (label_z / scale).to(tl.float32), (label_u / scale).to(tl.float32)
        wanted = True
        for attempt in range(2):
            if wanted:
                top, ref_top, s, a, y, r = _row_sums(
                    z_row, u_row, vocab, tl.maximum(start, -1e30), tl.maximum(ref_start, -1e30), scale, shift,
                    cap, ref_cap, SCALED, CAPPED, REF_CAPPED, SAME_CAP, REPEATS, LANES, VECTOR, STAGES,
                )  # fmt: skip
                kl, logp, ref_logp, lse, middle = _finished(top, ref_top, s, a, y, r, shift, label_z, label_u, scale)
                tl.store(found, _within(kl, 0.0, LINEAR_LIMIT).to(tl.float32))
                tl.store(found + rows, _within(logp, -LINEAR_LIMIT, 0.0).to(tl.float32))
                tl.store(found + 2 * rows, _within(ref_logp, -LINEAR_LIMIT, 0.0).to(tl.float32))
                tl.store(found + 3 * rows, _within(lse, -LARGEST, LARGEST).to(tl.float32))
                tl.store(centre, _within(middle, -LINEAR_LIMIT, LINEAR_LIMIT).to(tl.float64))
                # If the label is an outlier, KL is a small difference of large sums. With the shift E_p[z - u], the
                # sums are small.
                wanted = (attempt == 0) & (a * a > OUTLIER * y * s)
                shift += tl.where(wanted, a / s, 0.0)
    else:
        for part in tl.static_range(4):
            tl.store(found + part * rows, 0.0)
        tl.store(centre, 0.0)


@triton.jit
def gradient_kernel(
    z_ptr, u_ptr, labels_ptr, lse_ptr, centre_ptr, grad_kl_ptr, grad_logp_ptr, out_ptr,
    z_stride, u_stride, out_stride, vocab, scale, cap, ref_cap, largest,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block of a row's vocabulary; one program per row and block.

    The grid has one dimension, because the size of the other dimensions is limited.
    """
    blocks = tl.cdiv(vocab, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    label = tl.load(labels_ptr + row)
    grad_kl, grad_logp = tl.load(grad_kl_ptr + row), tl.load(grad_logp_ptr + row)
    out = out_ptr + row * out_stride + columns
    if (label != IGNORE_INDEX) & ((grad_kl != 0) | (grad_logp != 0)):
        z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row * u_stride + columns, mask=inside, other=0.0).to(tl.float32)
        slope = scale
        if CAPPED:
            decay = tl.exp(-2.0 * tl.abs(z / cap))
            slope = scale * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))  # 1 - tanh^2
        z, u, difference = _capped(z, u, scale, cap, ref_cap, SCALED, CAPPED, REF_CAPPED, SAME_CAP)
        p = tl.exp2(tl.minimum(z * scale - tl.load(lse_ptr + row), 0.0) * LOG2_E)
        score = grad_kl * (difference - tl.load(centre_ptr + row).to(tl.float32)) - grad_logp
        grad = (p * score + tl.where(columns == label, grad_logp, 0.0)) * slope
        grad = tl.minimum(tl.maximum(grad, -largest), largest)
        tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=inside)
