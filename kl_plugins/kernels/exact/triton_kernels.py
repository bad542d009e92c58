"""Triton kernels of the exact KL: the sums of a row in one pass over the vocabulary, and the gradient in another.

The formulas are those of :mod:`kl_plugins.kernels.exact.statistics`. No libdevice function is used: those exist neither
in Triton's interpreter nor under the same names in all its versions.
"""

# No ``from __future__ import annotations``: Triton reads the annotations of its kernels.

import triton
import triton.language as tl

from kl_plugins.numerics import LINEAR_LIMIT as _LINEAR_LIMIT

LOG2_E = tl.constexpr(1.4426950408889634)
LINEAR_LIMIT = tl.constexpr(_LINEAR_LIMIT)
OUTLIER = tl.constexpr(1.7)
"""A row is passed again where E[d]^2 is more than this many times E[k3(d)]; 2 would be a row without any divergence."""


@triton.jit
def _tanh(x):
    # 1 - e^(-2|x|) loses the digits of a small x, and a small x is what the difference of two logits is.
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.09, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def _parted(z, cap):
    """A soft-capped logit, and what it was made of: a number that subtracts exactly from others, and a small rest."""
    # cap tanh x is the logit and a rest, which is all that gets rounded. The rest of a quarter of x by its series, then
    # twice tanh 2y - 2y = 2 ((tanh y - y) - y tanh^2 y) / (1 + tanh^2 y), whose terms have one sign.
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
def _capped(z, u, scale, cap, ref_cap, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr):
    """Soft-capped logits, before the temperature, and their difference after it."""
    if SAME_CAP:
        # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b): the difference keeps its digits.
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
        difference = (z - u) * scale  # before the temperature: the difference of near logits is exact
    # Of a number and NaN, both take the number: -inf minus -inf becomes finite too.
    return z, u, tl.minimum(tl.maximum(difference, -LINEAR_LIMIT), LINEAR_LIMIT)


@triton.jit
def _add_block(
    z_row, u_row, columns, inside, max_z, max_u, s, a, y, r, scale, shift, cap, ref_cap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr,
):  # fmt: skip
    """Add one block of the vocabulary to the sums, which are kept per lane."""
    if MASKED:
        z = tl.load(z_row + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_row + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_row + columns).to(tl.float32)
        u = tl.load(u_row + columns).to(tl.float32)
    z, u, difference = _capped(z, u, scale, cap, ref_cap, CAPPED, REF_CAPPED, SAME_CAP)
    if MASKED:  # -inf: e and f, and with them every term, are 0
        z, u = tl.where(inside, z, float("-inf")), tl.where(inside, u, float("-inf"))

    top, ref_top = tl.maximum(max_z, tl.max(z, 0)), tl.maximum(max_u, tl.max(u, 0))
    exponent_scale = scale * LOG2_E
    if (top > max_z) | (ref_top > max_u):  # rare after the first blocks
        shrink, ref_shrink = tl.exp2((max_z - top) * exponent_scale), tl.exp2((max_u - ref_top) * exponent_scale)
        s, a, y, r = s * shrink, a * shrink, y * shrink, r * ref_shrink
    top_exponent, ref_exponent = top * exponent_scale, ref_top * exponent_scale
    e = tl.exp2(z * exponent_scale - top_exponent)
    f = tl.exp2(u * exponent_scale - ref_exponent)
    d = difference - shift  # finite: where the policy has no mass, e d is 0, and f keeps the reference's mass
    ed = e * d
    # k3(d) = e^-d - 1 + d. Its Taylor series where the three terms would cancel; else e e^-d is f, rescaled.
    series = 1 / 2 + d * (-1 / 6 + d * (1 / 24 + d * (-1 / 120 + d * (1 / 720 + d * (-1 / 5040 + d * (1 / 40320 + d * (-1 / 362880)))))))  # fmt: skip # noqa: E501
    rescale = tl.exp2(shift * LOG2_E + (ref_exponent - top_exponent))  # the difference of near numbers is exact
    reference = f * rescale
    if CAPPED or REF_CAPPED:
        # The cap rounds z and u, but not d: what stands for the reference has to fit the others.
        reference = tl.where((e > 0) & (tl.abs(d) < 60.0), e * tl.exp2(-d * LOG2_E), reference)
    ek3 = tl.where(tl.abs(d) < 1.0, ed * d * series, reference - e + ed)
    return top, ref_top, s + e, a + ed, y + ek3, r + f


@triton.jit
def row_sums_kernel(
    z_ptr, u_ptr, kept_ptr, label_ptr, ref_label_ptr, shift_ptr, sums_ptr,
    z_stride, u_stride, rows, vocab, scale, cap, ref_cap,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr, PASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: writes maxima, masses, first, second and shift to ``sums_ptr``, (7, rows)."""
    row = tl.program_id(0).to(tl.int64)
    z_row, u_row = z_ptr + row * z_stride, u_ptr + row * u_stride
    shift = tl.load(shift_ptr + row)
    columns = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    wanted = tl.load(kept_ptr + row) != 0  # an ignored row is not read, whatever it holds
    for attempt in range(PASSES):
        if wanted:
            # The maxima start at the label. From -inf, a first block without policy mass would lose the reference's.
            max_z = tl.maximum(tl.load(label_ptr + row) / scale, -1e30)
            max_u = tl.maximum(tl.load(ref_label_ptr + row) / scale, -1e30)
            lanes_s, lanes_a = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            lanes_y, lanes_r = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for start in tl.range(0, whole, BLOCK, num_stages=3):
                max_z, max_u, lanes_s, lanes_a, lanes_y, lanes_r = _add_block(
                    z_row, u_row, start + columns, columns < BLOCK, max_z, max_u, lanes_s, lanes_a, lanes_y, lanes_r,
                    scale, shift, cap, ref_cap, False, CAPPED, REF_CAPPED, SAME_CAP,
                )  # fmt: skip
            if whole < vocab:
                rest = whole + columns
                max_z, max_u, lanes_s, lanes_a, lanes_y, lanes_r = _add_block(
                    z_row, u_row, rest, rest < vocab, max_z, max_u, lanes_s, lanes_a, lanes_y, lanes_r,
                    scale, shift, cap, ref_cap, True, CAPPED, REF_CAPPED, SAME_CAP,
                )  # fmt: skip
            s, a, y, r = tl.sum(lanes_s, 0), tl.sum(lanes_a, 0), tl.sum(lanes_y, 0), tl.sum(lanes_r, 0)
            tl.store(sums_ptr + row, max_z)
            tl.store(sums_ptr + rows + row, max_u)
            tl.store(sums_ptr + 2 * rows + row, s)
            tl.store(sums_ptr + 3 * rows + row, a)
            tl.store(sums_ptr + 4 * rows + row, y)
            tl.store(sums_ptr + 5 * rows + row, r)
            tl.store(sums_ptr + 6 * rows + row, shift)
            # Where the label is an outlier, KL is the small difference of large sums. Around E_p[z - u] it is not.
            wanted = (attempt + 1 < PASSES) & (a * a > OUTLIER * y * s)
            if wanted:
                shift += a / s


@triton.jit
def gradient_kernel(
    z_ptr, u_ptr, kept_ptr, labels_ptr, lse_ptr, centre_ptr, grad_kl_ptr, grad_logp_ptr, out_ptr,
    z_stride, u_stride, out_stride, vocab, scale, cap, ref_cap, largest,
    CAPPED: tl.constexpr, REF_CAPPED: tl.constexpr, SAME_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of the vocabulary, in one dimension: the others have small limits."""
    blocks = tl.cdiv(vocab, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    grad_kl, grad_logp = tl.load(grad_kl_ptr + row), tl.load(grad_logp_ptr + row)
    out = out_ptr + row * out_stride + columns
    if (tl.load(kept_ptr + row) != 0) & ((grad_kl != 0) | (grad_logp != 0)):
        z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row * u_stride + columns, mask=inside, other=0.0).to(tl.float32)
        slope = scale
        if CAPPED:
            decay = tl.exp(-2.0 * tl.abs(z / cap))
            slope = scale * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))  # 1 - tanh^2
        z, u, difference = _capped(z, u, scale, cap, ref_cap, CAPPED, REF_CAPPED, SAME_CAP)
        p = tl.exp(tl.minimum(z * scale - tl.load(lse_ptr + row), 0.0))
        score = grad_kl * (difference - tl.load(centre_ptr + row)) - grad_logp
        at_label = columns == tl.load(labels_ptr + row)
        grad = (p * score + tl.where(at_label, grad_logp, 0.0)) * slope
        grad = tl.minimum(tl.maximum(grad, -largest), largest)
        tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=inside)
