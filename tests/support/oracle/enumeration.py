"""Small tabular policies whose every sequence can be written down, so that expectations are sums.

A policy is one logit table per position: `tables[t]` is (V^t, V), a row for each prefix. Nothing here imports the
package under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Tables = tuple[Tensor, ...]
POLICIES = ("current", "old", "sampler", "reference")


@dataclass(frozen=True, eq=False)
class Problem:
    """Four policies over all sequences of at most `length` tokens; token 0 ends a sequence when `stops` is set.

    Attributes:
        tokens: (N, T) every distinct sequence; what follows a stop is 0.
        states: (N, T) the row of `tables[t]` that each prefix uses.
        mask: (N, T) True up to and including the stop.
        policies: the four logit tables by name; those of `current` require grad.
    """

    name: str
    vocab: int
    length: int
    stops: bool
    policies: dict[str, Tables]
    tokens: Tensor
    states: Tensor
    mask: Tensor
    cache: dict[str, Tensor] = field(default_factory=dict)

    def log_probs(self, policy: str) -> Tensor:
        """(N, T) log-probabilities of the tokens, 0 outside the mask; differentiable for `current`."""
        columns = [
            torch.log_softmax(table, -1)[self.states[:, t], self.tokens[:, t]]
            for t, table in enumerate(self.policies[policy])
        ]
        return torch.stack(columns, 1).masked_fill(~self.mask, 0.0)

    def probabilities(self, policy: str) -> Tensor:
        """(N,) probability of each sequence, differentiable for `current`; sums to 1."""
        return self.log_probs(policy).sum(-1).exp()

    def state_probabilities(self, policy: str) -> list[Tensor]:
        """For each position the (V^t,) probability that the prefix is reached alive, differentiable for `current`."""
        reached = torch.ones(1, dtype=torch.float64)
        result = []
        for table in self.policies[policy]:
            result.append(reached)
            children = reached[:, None] * torch.softmax(table, -1)
            if self.stops:
                children = torch.cat([torch.zeros_like(children[:, :1]), children[:, 1:]], 1)
            reached = children.reshape(-1)
        return result

    def distributions(self, policy: str) -> list[Tensor]:
        """For each position the (V^t, V) log-distribution over the next token."""
        return [torch.log_softmax(table, -1) for table in self.policies[policy]]

    def gradient(self, objective: Tensor) -> Tensor:
        """Flat gradient of a scalar with respect to all logits of the current policy."""
        grads = torch.autograd.grad(objective, self.policies["current"], allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    def expected(self, per_sequence: Tensor, data: str) -> Tensor:
        """Expectation over sequences drawn from the policy `data`, which is held fixed, of an (N,) quantity."""
        return (self.probabilities(data).detach() * per_sequence).sum()

    def cached(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """The value under `key`, computed once per problem."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]

    def with_policies(self, **policies: Sequence[Tensor]) -> Problem:
        """The same sequences under other tables, for example `with_policies(current=reference_tables)`."""
        merged = dict(self.policies)
        for name, tables in policies.items():
            merged[name] = tuple(table.detach().clone().requires_grad_(name == "current") for table in tables)
        return replace(self, name=f"{self.name}, other {', '.join(policies)}", policies=merged, cache={})


def enumerate_tokens(vocab: int, length: int, stops: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All sequences: their tokens, the prefix index before each token, and the mask; all (N, T)."""
    tokens = torch.cartesian_prod(*[torch.arange(vocab)] * length).reshape(-1, length)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if stops:
        mask[:, 1:] = (tokens[:, :-1] != 0).cumprod(-1).bool()
        kept = ((tokens == 0) | mask).all(-1)
        tokens, mask = tokens[kept], mask[kept]
    states = torch.zeros_like(tokens)
    for t in range(1, length):
        states[:, t] = states[:, t - 1] * vocab + tokens[:, t - 1]
    return tokens, states, mask


def make_problem(
    vocab: int,
    length: int,
    seed: int,
    *,
    stops: bool = False,
    scale: float = 1.0,
    drift: float = 0.6,
    lag: float = 0.3,
    mismatch: float = 0.3,
) -> Problem:
    """Draw four policies with Gaussian logits.

    Args:
        vocab: V, tokens per position.
        length: T, positions.
        seed: of the generator; problems are reproducible on the CPU.
        stops: whether token 0 ends a sequence, which gives responses of different lengths.
        scale: standard deviation of the reference policy's logits.
        drift: standard deviation of current minus reference logits.
        lag: standard deviation of old minus current logits.
        mismatch: standard deviation of sampler minus old logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(sd: float) -> list[Tensor]:
        shapes = [(vocab**t, vocab) for t in range(length)]
        return [sd * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def moved(tables: Sequence[Tensor], sd: float) -> list[Tensor]:
        return [table + step for table, step in zip(tables, noise(sd), strict=True)]

    reference = noise(scale)
    current = moved(reference, drift)
    old = moved(current, lag)
    sampler = moved(old, mismatch)
    tokens, states, mask = enumerate_tokens(vocab, length, stops)
    policies: dict[str, Tables] = {
        "current": tuple(table.requires_grad_() for table in current),
        "old": tuple(old),
        "sampler": tuple(sampler),
        "reference": tuple(reference),
    }
    name = f"V={vocab} T={length} seed={seed}{' with stops' if stops else ''}"
    return Problem(name, vocab, length, stops, policies, tokens, states, mask)
