"""The results of the states of a policy as rows, and the rule that chooses the default k from them.

The rule was written before the first run. All of its numbers are constants of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import KS, PAIRS, StateNoise

TRAINED, PERTURBED = "trained", "perturbed"
"""Kinds of policies. Only a policy that was really trained decides."""

MOST_NOISE = 0.1
"""Largest allowed token noise relative to `k2@loss`: the upper end of the 95 % interval must not exceed it."""
MOST_BYTES = 600
"""Largest allowed number of bytes per token and step for the numbers that the reference gives."""
LEAST_KL = 0.01
"""Smallest mean KL per token of a policy that can decide, nats. Nearer to the reference there is little to estimate."""

NUMBER_BYTES = 4  # ids are sent as int32 or float32, log-probs as float32
RESAMPLES = 2000
QUANTILES = (0.1, 0.5, 0.9)
SAMPLED, EXACT = "k2@loss", "exact@loss"


class NoNoiseError(ValueError):
    """A policy equals the reference in every state, so that no estimator has any noise."""


def bytes_per_token(k: int, draws: int = 0) -> int:
    """Return the bytes of the numbers per token: k ids, k log-probs, the log of the tail mass, and those of the draws.

    A draw has an id, a log-prob and a rate, and with draws there is the rate of the label.
    """
    return NUMBER_BYTES * (2 * k + 1 + (3 * draws + 1 if draws else 0))


def sent(k: int | None, draws: int = 0) -> dict[str, int | None]:
    """Return the bytes that the reference sends per token and for a million tokens; None without a set."""
    size = None if k is None else bytes_per_token(k, draws)
    return {"bytes_per_token": size, "bytes_per_million_tokens": None if size is None else 1_000_000 * size}


def bootstrap(above: Tensor, below: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the 95 % interval of ratios of sums, by drawing whole sequences with replacement.

    Args:
        above: (S, E) numerators, summed over the states of each sequence.
        below: (S,) denominators, likewise.
        seed: seed of the draws.

    Returns:
        The lower and the upper ends, (E,) each.
    """
    count = len(below)
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    ratios = (times @ above) / (times @ below)[:, None]
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return low, high


def summed(values: Tensor, sequence: Tensor) -> Tensor:
    """Return the sums of (N, ...) values over the states of each sequence; (N,) `sequence` has their indices."""
    _, index = torch.unique(sequence, return_inverse=True)
    return values.new_zeros(int(index.max()) + 1, *values.shape[1:]).index_add_(0, index, values)


def described(name: str, kind: str, noise: StateNoise, sequence: Tensor) -> dict[str, Any]:
    """Return the description of a policy in the states that it visited.

    Args:
        name: name of the policy, for tables.
        kind: `TRAINED` or `PERTURBED`.
        noise: results of the states, on the CPU.
        sequence: (N,) index of the sequence of each state.
    """
    states = torch.ones_like(noise.kl)
    low, high = bootstrap(summed(noise.kl[:, None], sequence), summed(states, sequence))
    return {
        "policy": name,
        "kind": kind,
        "sequences": len(set(sequence.tolist())),
        "states": len(noise.kl),
        "kl_per_token": float(noise.kl.mean()),
        "kl_low": float(low[0]),
        "kl_high": float(high[0]),
        "k2_noise_to_gradient": float(noise.sampled.sum() / noise.gradient.sum()),
        "states_without_noise": int((noise.sampled == 0).sum()),
    }


def rows_of(
    name: str,
    kind: str,
    noise: StateNoise,
    sequence: Tensor,
    ks: Sequence[int] = KS,
    pairs: Sequence[tuple[int, int]] = PAIRS,
) -> list[dict[str, Any]]:
    """Return one row per estimator.

    `noise` in a row is the token noise over all states relative to that of `k2@loss`, a ratio of sums, with the 95 %
    interval `low` to `high` over sequences. `q10`, `q50` and `q90` are quantiles of the ratio of single states, where
    `k2@loss` has noise. `to_gradient` is the token noise relative to the squared exact gradient, again a ratio of sums.

    Args:
        name, kind, noise, sequence: as in `described`.
        ks: the numbers of tokens of the columns in `noise`.
        pairs: the numbers of tokens and of draws of its columns with draws.

    Raises:
        NoNoiseError: The policy is the reference.
    """
    noisy = noise.sampled > 0
    if not noisy.any():
        raise NoNoiseError(f"the policy {name!r} equals the reference in every state: there is no noise to compare")
    labels: list[tuple[str, int | None, bool | None, int]] = [(SAMPLED, None, None, 0), (EXACT, None, None, 0)]
    labels += [(f"exact@loss/top:{k}", k, True, 0) for k in ks]
    labels += [(f"top:{k} without the bucket", k, False, 0) for k in ks]
    labels += [(f"top:{k} and {draws} draws", k, True, draws) for k, draws in pairs]
    own = torch.stack([noise.sampled, torch.zeros_like(noise.sampled)], -1)
    columns = torch.cat([own, noise.bucket, noise.plain, noise.drawn], -1)
    low, high = bootstrap(summed(columns, sequence), summed(noise.sampled, sequence))
    ratio, to_gradient = columns.sum(0) / noise.sampled.sum(), columns.sum(0) / noise.gradient.sum()
    spread = (columns[noisy] / noise.sampled[noisy, None]).quantile(torch.tensor(QUANTILES, dtype=columns.dtype), dim=0)
    return [
        {
            "policy": name, "kind": kind, "estimator": label, "k": k, "bucket": bucket, "draws": draws,
            "noise": float(ratio[n]), "low": float(low[n]), "high": float(high[n]),
            **{f"q{100 * q:.0f}": float(spread[i, n]) for i, q in enumerate(QUANTILES)},
            "to_gradient": float(to_gradient[n]),
            **sent(k if bucket else None, draws),
        }
        for n, (label, k, bucket, draws) in enumerate(labels)
    ]  # fmt: skip


def judge(policies: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose the default k: the smallest whose noise and bytes are within the limits, on every trained policy.

    A policy that is only perturbed does not count. If a trained policy is nearer to the reference than `LEAST_KL`,
    nothing is chosen. If no k is within both limits, nothing is chosen either, and the verdict names the k that each
    limit allows.

    Args:
        policies: descriptions from `described`.
        rows: rows from `rows_of`.

    Returns:
        `k`, or None if nothing is chosen; and `verdict`, the result in words. It says in addition which of the pairs
        with draws has the fewest bytes within both limits.
    """
    found = _without_draws(policies, rows)
    return {**found, "verdict": "\n".join([found["verdict"], *_with_draws(rows)])}


def _with_draws(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    upper: dict[tuple[int, int], float] = {}
    for row in rows:
        if row["kind"] == TRAINED and row.get("draws"):
            pair = row["k"], row["draws"]
            upper[pair] = max(row["high"], upper.get(pair, 0.0))
    within = sorted((pair for pair in upper if bytes_per_token(*pair) <= MOST_BYTES), key=lambda p: bytes_per_token(*p))
    quiet = [pair for pair in within if upper[pair] <= MOST_NOISE]
    if quiet:
        k, draws = quiet[0]
        return [
            f"With draws of the reference, top:{k} and {draws} draws have the fewest bytes within both limits: a noise "
            f"of at most {upper[k, draws]:.3f}, and {bytes_per_token(k, draws)} bytes per token."
        ]
    if within:
        best = min(within, key=lambda pair: upper[pair])
        return [f"No pair with draws is within both limits; top:{best[0]} and {best[1]} draws have {upper[best]:.3f}."]
    return []


def _without_draws(policies: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [policy for policy in policies if policy["kind"] == TRAINED]
    if not trained:
        return {"k": None, "verdict": "No policy was really trained, so nothing is said about the default k."}
    nearest = min(policy["kl_per_token"] for policy in trained)
    if nearest < LEAST_KL:
        return {
            "k": None,
            "verdict": f"Undecided: a trained policy has a mean KL of {nearest:.2g} nats per token, and the rule needs "
            f"at least {LEAST_KL:g}.",
        }
    upper: dict[int, float] = {}
    for row in rows:
        if row["kind"] == TRAINED and row["bucket"] and not row.get("draws"):
            upper[row["k"]] = max(row["high"], upper.get(row["k"], 0.0))
    quiet = sorted(k for k, high in upper.items() if high <= MOST_NOISE)
    small = sorted(k for k in upper if bytes_per_token(k) <= MOST_BYTES)
    both = [k for k in quiet if k in small]
    if both:
        k = both[0]
        return {
            "k": k,
            "verdict": f"The default is top:{k}, with a token noise of at most {upper[k]:.3f} of that of {SAMPLED} "
            f"(upper end of the 95 % interval) and {bytes_per_token(k)} bytes per token.",
        }
    found = (
        f"The smallest k whose noise is at most {MOST_NOISE:g} of that of {SAMPLED} is {quiet[0]}, with "
        f"{bytes_per_token(quiet[0])} bytes per token."
        if quiet
        else f"No k up to {max(upper)} has a noise of at most {MOST_NOISE:g} of that of {SAMPLED}; {max(upper)} has up "
        f"to {upper[max(upper)]:.3f}."
    )
    room = (
        f" The largest k within {MOST_BYTES} bytes is {small[-1]}, with a noise of up to {upper[small[-1]]:.3f}."
        if small
        else f" No k is within {MOST_BYTES} bytes."
    )
    return {"k": None, "verdict": f"{found}{room} No k without draws is within both limits."}
