"""Exact evaluation of a policy by visiting every completion that it can write, so that there is no sampling noise.

The tree of prefixes is visited breadth-first, one token per level. Prefixes whose probability given the prompt is below
`PRUNE` are dropped. `coverage` is the total probability of the completions that were visited to their end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from . import task

PRUNE = 1e-6
WIDEST = 40_000  # largest number of prefixes per level; only an untrained model has more

Coefficient = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Level:
    """All kept states of one depth, with their probabilities and the distributions of both models there."""

    weight: torch.Tensor  # (N,) probability of the prefix, all prompts equally likely
    logp: torch.Tensor  # (N, V) log-probs of the policy, nats
    u: torch.Tensor  # (N, V) log-ratio of policy to reference, nats
    parent: torch.Tensor  # (N,) index into the level above
    token: torch.Tensor  # (N,) last token of the prefix


@dataclass
class Tree:
    """All completions of a policy."""

    levels: list[Level]
    rewards: torch.Tensor  # (prompts,) probability of a rewarded completion
    coverage: float


@dataclass(frozen=True, eq=False)
class Space:
    """The prompts and the rewarded sequences of a task, as token ids of the demo's vocabulary."""

    prompts: torch.Tensor  # (P, L) ids of the prompts, all of one length
    rewarded: torch.Tensor  # (N,) codes of the rewarded sequences: prompt, completion, end of sequence
    completion_tokens: int  # largest number of tokens of a completion

    @classmethod
    def of(cls, prompts: Sequence[str], rewarded: Iterable[str], completion_tokens: int) -> Space:
        """Make the space from prompts and rewarded sequences that are given as words."""
        codes = torch.tensor([code(task.ids(line)) for line in rewarded])
        return cls(torch.tensor([task.ids(prompt) for prompt in prompts]), codes, completion_tokens)


def code(ids: list[int]) -> int:
    """Return one integer for a sequence of token ids: the ids are digits in base V, after a leading 1."""
    total = 1
    for i in ids:
        total = total * len(task.VOCABULARY) + i
    return total


@lru_cache(maxsize=1)
def demo_space() -> Space:
    """Return the task of the demo, by verifying every possible expression."""
    rewarded = (
        f"{task.prompt(number)} {expression} <eos>"
        for number in task.NUMBERS
        for expression in task.expressions()
        if task.verify(task.prompt(number), expression)
    )
    return Space.of([task.prompt(n) for n in task.NUMBERS], rewarded, task.COMPLETION_TOKENS)


@torch.no_grad()
def walk(model: Any, reference: Any, space: Space | None = None) -> Tree:
    """Visit all completions of all prompts.

    Args:
        model: the policy.
        reference: the reference model, with the same vocabulary and on the same device.
        space: the task; by default that of the demo.
    """
    space, device = space or demo_space(), model.device
    prompts = space.prompts
    count, size, eos = len(prompts), len(task.VOCABULARY), task.ids("<eos>")[0]
    codes = torch.tensor([code(row) for row in prompts.tolist()])
    origin, parent, token, ids = torch.arange(count), torch.arange(count), prompts[:, -1], prompts
    weight = torch.full((count,), 1.0 / count, dtype=torch.float64)
    rewards, coverage = torch.zeros(count, dtype=torch.float64), 0.0
    caches: list[Any] = [None, None]
    levels: list[Level] = []
    for depth in range(space.completion_tokens):
        both = zip((model, reference), caches, strict=True)
        out = [m(input_ids=ids.to(device), past_key_values=cache, use_cache=True) for m, cache in both]
        logp, ref = (torch.log_softmax(o.logits[:, -1].cpu().double(), -1) for o in out)
        levels.append(Level(weight, logp, logp - ref, parent, token))
        joint = weight[:, None] * logp.exp()
        least = max(PRUNE / count, joint.flatten().topk(min(WIDEST, joint.numel())).values[-1].item())
        row, column = (joint >= least).nonzero(as_tuple=True)
        codes, weight, origin = codes[row] * size + column, joint[row, column], origin[row]
        ended = (column == eos) | (depth + 1 == space.completion_tokens)
        rewards.index_add_(0, origin, weight * (ended & torch.isin(codes, space.rewarded)))
        coverage += float(weight[ended].sum())
        parent, token = row[~ended], column[~ended]
        codes, weight, origin = codes[~ended], weight[~ended], origin[~ended]
        if not len(parent):
            break
        caches, ids = [o.past_key_values for o in out], token[:, None]
        for cache in caches:
            cache.batch_select_indices(parent.to(device))
    return Tree(levels, rewards * count, coverage)


def coefficient_moments(levels: list[Level], own: Coefficient, future: bool) -> tuple[float, float]:
    """Compute mean and standard deviation of the coefficient over the tokens that the policy writes.

    Args:
        levels: levels of the tree.
        own: coefficient of a token as a function of u, nats.
        future: whether u of the following tokens is added, as in `k1@advantage`.

    Returns:
        Mean and standard deviation, nats.
    """
    first = second = tokens = 0.0
    below: Level | None = None
    later1 = later2 = torch.zeros(0)
    for level in reversed(levels):
        f1, f2 = torch.zeros_like(level.u), torch.zeros_like(level.u)
        if future and below is not None:  # moments of the sum of u over the following tokens, by state and token
            f1[below.parent, below.token], f2[below.parent, below.token] = later1, later2
        p, c = level.logp.exp(), own(level.u)
        later1, later2 = (p * (c + f1)).sum(-1), (p * (c * c + 2 * c * f1 + f2)).sum(-1)
        first, second = first + float(level.weight @ later1), second + float(level.weight @ later2)
        tokens += float(level.weight.sum())
        below = level
    mean = first / tokens
    return mean, math.sqrt(max(second / tokens - mean * mean, 0.0))


def own_coefficient(arm: str) -> tuple[Coefficient | None, bool]:
    """Return the coefficient of an arm as a function of u, from the table of kl-plugins.

    Returns:
        The function, and whether the u of later tokens are added to it. (None, False) if the arm has no coefficient, or
        if its coefficient has another form.
    """
    from kl_plugins import KLSpec
    from kl_plugins.estimators import find_estimator

    if arm == "none":
        return None, False
    spec = KLSpec.parse({"native-k3": "k3@loss", "native-bias-corrected": "k2@loss/is:token"}.get(arm, arm))
    row = find_estimator(spec.estimator)
    future = spec.horizon == "sequence" and spec.placement != "reward"
    if row is None or spec.placement == "reward" or (future and (spec.future != "k1" or spec.gamma != 1.0)):
        return None, False
    elementwise = row.value if spec.placement == "advantage" else row.coefficient
    return (lambda u: elementwise(u, u.clamp(-spec.bound, spec.bound))), future


def evaluate(
    model: Any, reference: Any, own: Coefficient | None, future: bool, space: Space | None = None
) -> dict[str, float | None]:
    """Compute exact reward, KL to the reference, entropy and moments of the coefficient of a policy.

    Args:
        model: the policy.
        reference: the reference model.
        own: coefficient of the arm's estimator as a function of u, or None.
        future: whether the coefficient adds u of the following tokens.
        space: the task; by default that of the demo.

    Returns:
        `reward` (probability of a rewarded completion), `kl` and `entropy` (nats per completion), `coef_mean` and
        `coef_std` (nats; None without a coefficient), `coverage` (share of the probability that was visited).
    """
    training = model.training
    model.eval()
    tree = walk(model, reference, space)
    model.train(training)
    kl = sum(float(v.weight @ (v.logp.exp() * v.u).sum(-1)) for v in tree.levels)
    entropy = -sum(float(v.weight @ (v.logp.exp() * v.logp).sum(-1)) for v in tree.levels)
    mean, std = coefficient_moments(tree.levels, own, future) if own else (None, None)
    reward = float(tree.rewards.mean())
    return {
        "reward": reward, "kl": kl, "entropy": entropy,
        "coef_mean": mean, "coef_std": std, "coverage": tree.coverage,
    }  # fmt: skip


def optimum(rewards: torch.Tensor, beta: float) -> dict[str, float]:
    """Compute the optimum of E[R] - beta KL: the reference, reweighted by exp(R / beta) for each prompt.

    Args:
        rewards: (prompts,) probability of a rewarded completion under the reference.
        beta: the coefficient of the KL term.

    Returns:
        `reward`, `kl` (nats per completion) and `objective` of the optimal policy.
    """
    best = torch.sigmoid(torch.logit(rewards) + 1 / beta)
    kl = best * (best / rewards).log() + (1 - best) * ((1 - best) / (1 - rewards)).log()
    return {"reward": float(best.mean()), "kl": float(kl.mean()), "objective": float((best - beta * kl).mean())}
