"""Rows of logits with a known distance, textbook formulas in float64, and what a call allocates or draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact.tail_draws import NOTHING, Draws


class Rows(NamedTuple):
    logits: Tensor
    ref_logits: Tensor
    labels: Tensor


class Textbook(NamedTuple):
    kl: Tensor
    logp: Tensor
    ref_logp: Tensor


def make_rows(
    rows: int,
    vocabulary: int,
    *,
    std: float = 4.0,
    distance: float = 0.1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Rows:
    """Gaussian logits, moved by `distance`, and labels drawn from the policy; KL is about distance^2 / 2."""
    torch.manual_seed(seed)
    ref_logits = std * torch.randn(rows, vocabulary)
    logits = (ref_logits + distance * torch.randn(rows, vocabulary)).to(dtype)
    labels = torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]
    return Rows(logits, ref_logits.to(dtype), labels)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def textbook(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> Textbook:
    """Two log-softmaxes in float64; differentiable."""
    log_p = torch.log_softmax(capped(logits.double(), softcap) / temperature, -1)
    log_q = torch.log_softmax(capped(ref_logits.double(), ref_softcap) / temperature, -1)
    index = labels.clamp_min(0)[..., None]
    # -inf - (-inf) where both exclude a token.
    difference = torch.where(log_p.isneginf(), 0.0, log_p - log_q)
    return Textbook((log_p.exp() * difference).sum(-1), *(x.gather(-1, index)[..., 0] for x in (log_p, log_q)))


def norm_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, Euclidean over everything."""
    return float((found.double() - wanted).norm() / wanted.norm())


def peak_bytes(call: Callable[[], Any]) -> int:
    """The largest sum of allocations that were alive at once during a call, in bytes; its result counts too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def check_rates(draws: Draws, chance: Tensor, top: Tensor) -> None:
    """Check that many draws of one row come as often as they say, and never from the most probable tokens.

    Args:
        draws: of one row (1, m).
        chance: (V,) probability of each token to be drawn.
        top: the most probable tokens.
    """
    many, found = draws.ids.shape[-1], draws.log_rate < NOTHING
    assert not torch.isin(draws.ids[found], top).any()
    often = torch.bincount(draws.ids[found], minlength=len(chance)).double() / many
    # Six standard errors of a share, and one token for those that are hardly ever drawn.
    assert ((often - chance).abs() <= 6 * (chance / many).sqrt() + 1 / many).all()
    assert (draws.log_rate[found].double() - (many * chance[draws.ids[found]]).log()).abs().max() < 1e-5
    assert chance[top].sum() < 1e-6
    nothing = 1 - float(found.double().mean())
    assert abs(float(chance.sum()) + nothing - 1) < 6 * (max(nothing, 1 / many) / many) ** 0.5 + 1e-5
