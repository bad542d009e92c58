"""`python -m benchmarks.study.stale.optima`: what a token-local KL and a sequence KL each lead to, by enumeration.

The optimum of E[R] - beta KL is the reference, reweighted by exp(R / beta). A term that gives each token its own KL
alone has another fixed point: there every token is drawn by r exp(Q / beta), Q being the reward that the policy itself
expects after it, without the KL that is still to come. Both are found here by going backwards through the tree of
completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.demo import evaluate, task
from benchmarks.demo.evaluate import Space

LEAST = 1e-9
"""Prefixes that are less probable under the reference than this are left out."""


@dataclass
class Depth:
    """All states of one depth.

    Attributes:
        logp: (N, V) the reference, nats.
        parent, token: (N,) the state above and the token that led here.
        reward: (N, V) of a completion that ends with the token; 0 where it does not end or is left out.
        kept: (N, V) whether the token's continuation or end was visited.
    """

    logp: Tensor
    parent: Tensor
    token: Tensor
    reward: Tensor
    kept: Tensor


@torch.no_grad()
def tree(reference: Any, space: Space, least: float = LEAST) -> list[Depth]:
    """All completions of the reference.

    Args:
        reference: the model, in evaluation mode.
        space: the task.
        least: prefixes below this probability are left out.
    """
    prompts, size, eos = space.prompts, len(task.VOCABULARY), task.ids("<eos>")[0]
    codes = torch.tensor([evaluate.code(row) for row in prompts.tolist()])
    parent, token, ids, cache = torch.arange(len(prompts)), prompts[:, -1], prompts, None
    weight = torch.ones(len(prompts), dtype=torch.float64)
    found = []
    for depth in range(space.completion_tokens):
        out = reference(input_ids=ids, past_key_values=cache, use_cache=True)
        logp = out.logits[:, -1].double().log_softmax(-1)
        joint, last = weight[:, None] * logp.exp(), depth + 1 == space.completion_tokens
        kept = joint >= least
        reached = codes[:, None] * size + torch.arange(size)
        ends = torch.full_like(kept, last)
        ends[:, eos] = True
        reward = (kept & ends & torch.isin(reached, space.rewarded)).double()
        found.append(Depth(logp, parent, token, reward, kept))
        parent, token = (kept & ~ends).nonzero(as_tuple=True)
        if not len(parent):
            break
        codes, weight = reached[parent, token], joint[parent, token]
        cache, ids = out.past_key_values, token[:, None]
        cache.batch_select_indices(parent)
    return found


def fixed_point(depths: list[Depth], beta: float, sequence: bool) -> dict[str, float]:
    """What every token leads to where it is drawn by r exp(Q / beta).

    Args:
        depths: of the tree.
        beta: the coefficient of the KL term.
        sequence: whether Q has the KL to come taken off, as the optimum's has.

    Returns:
        `reward`, `kl` (nats per completion) and `objective`, means over the prompts.
    """
    reward: Tensor | None = None
    kl: Tensor | None = None
    for i in reversed(range(len(depths))):
        depth = depths[i]
        rewards, kls = depth.reward.clone(), torch.zeros_like(depth.reward)
        if reward is not None and kl is not None:  # of the states below
            below = depths[i + 1]
            rewards[below.parent, below.token] = reward
            kls[below.parent, below.token] = kl
        worth = rewards - beta * kls if sequence else rewards
        chosen = (depth.logp + worth / beta).log_softmax(-1)
        p = chosen.exp()
        reward, kl = (p * rewards).sum(-1), (p * (chosen - depth.logp + kls)).sum(-1)
    assert reward is not None
    assert kl is not None
    ends = {"reward": float(reward.mean()), "kl": float(kl.mean())}
    return ends | {"objective": ends["reward"] - beta * ends["kl"]}


def main(
    reference: Annotated[Path, typer.Argument(help="Folder of a reference under out/bench/study/references.")],
    name: Annotated[str, typer.Option("--task", help="Its task.")] = "rare",
    beta: Annotated[float, typer.Option(help="Coefficient of the KL.")] = 0.2,
) -> None:
    """Print the optimum of E[R] - beta KL and the fixed point of a token-local term."""
    from benchmarks.demo.train import load
    from benchmarks.study.tasks import TASKS

    depths = tree(load(reference).eval(), TASKS[name].space())
    for title, sequence in (("optimum of E[R] - beta KL", True), ("fixed point of a token-local KL", False)):
        ends = fixed_point(depths, beta, sequence)
        typer.echo(f"{title}: " + ", ".join(f"{key} {value:.3f}" for key, value in ends.items()))


if __name__ == "__main__":
    typer.run(main)
