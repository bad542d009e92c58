"""Float64 for the rows that one pass in float32 cannot compute: outlying labels, overflow, infinite logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.kernels.exact.statistics import Options, Rows, RowStatistics, log_ratio, offset, saturated, scaled
from kl_plugins.numerics import LINEAR_LIMIT

TILE_BYTES = 4 * 2**20


def repair(
    statistics: RowStatistics, doubtful: Tensor, rows: Rows, options: Options, tile_bytes: int = TILE_BYTES
) -> RowStatistics:
    """Compute the doubtful rows again, with two log-sum-exps in float64.

    Args:
        statistics: statistics of all rows; overwritten in the doubtful rows.
        doubtful: (N,) bool, from :func:`~kl_plugins.kernels.exact.statistics.finish`.
        rows, options: the arguments of the first pass.
        tile_bytes: bound on the temporaries, in bytes; those of at least one row are allocated in any case.

    Returns:
        ``statistics``.
    """
    again = doubtful.nonzero()[:, 0]
    step = max(1, tile_bytes // (8 * 8 * rows.logits.shape[-1]))
    for start in range(0, again.shape[0], step):
        part = again[start : start + step]
        found = precise_rows(rows.at(part), options)
        for target, source in zip(statistics, found, strict=True):
            target[part] = source
    return statistics


def precise_rows(rows: Rows, options: Options) -> RowStatistics:
    """Compute the statistics of rows (n, V) with the textbook formulas in float64."""
    dtype = torch.promote_types(rows.logits.dtype, torch.float32)
    logits, ref_logits = rows.logits.double(), rows.ref_logits.double()
    z, u = scaled(logits, options.scale, options.softcap), scaled(ref_logits, options.scale, options.ref_softcap)
    lse, ref_lse = z.logsumexp(-1), u.logsumexp(-1)
    ratio = log_ratio(logits, ref_logits, options)
    centre = (torch.exp(z - lse[:, None]) * ratio).sum(-1)
    # A reference without any mass has an infinite KL. The difference of infinities below would be NaN.
    kl = torch.where(ref_lse == -torch.inf, LINEAR_LIMIT, centre - lse + ref_lse)
    index = rows.labels.clamp_min(0)[:, None]
    logp, ref_logp = z.gather(-1, index)[:, 0] - lse, u.gather(-1, index)[:, 0] - ref_lse
    ref_logp = torch.where(ref_lse == -torch.inf, -LINEAR_LIMIT, ref_logp)
    # The centre keeps more digits than float32 holds only in rows whose gradient needs them: see RowStatistics.
    far = offset(centre, kl, torch.exp(z.amax(-1) - lse))
    return saturated(kl, logp, ref_logp, lse, torch.where(far, centre, centre.to(dtype).double()), dtype)
