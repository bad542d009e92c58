"""`python -m benchmarks.study.stale.optima` enumerates what a token-local KL and a sequence KL each lead to.

The optimum of E[R] - beta KL is the reference, reweighted by exp(R / beta). A token-local KL term gives each token only
its own KL, and it has another fixed point. At this point every token is drawn in proportion to r exp(Q / beta). Here r
is the token's probability under the reference. Q is the reward that the policy itself expects after the token, without
the KL that is still to come. This module finds both points by going backwards through the tree of completions.
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
"""The tree leaves out prefixes whose probability under the reference is below this value."""


@dataclass
class Depth:
    """All N states of one depth of the tree, with V tokens that can follow each state.

    Attributes:
        logp: (N, V) log-probability of every next token under the reference, nats.
        parent: (N,) index of the state one depth above. At the first depth it is the index of the prompt.
        token: (N,) token that led from the parent to this state. At the first depth it is the prompt's last token.
        reward: (N, V) reward of the completion that ends with the token. It is 0 if the completion does not end there
            or is left out.
        kept: (N, V) whether the tree includes the token's continuation or end.
    """

    logp: Tensor
    parent: Tensor
    token: Tensor
    reward: Tensor
    kept: Tensor


@torch.no_grad()
def tree(reference: Any, space: Space, least: float = LEAST) -> list[Depth]:
    """Return the tree of all completions of the reference, one entry per depth.

    Args:
        reference: the reference model, in evaluation mode.
        space: the enumerated task.
        least: the tree leaves out prefixes whose probability is below this value.
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
    """Return the reward and KL of the policy that draws every token in proportion to r exp(Q / beta).

    Args:
        depths: depths of the tree, from `tree`.
        beta: coefficient of the KL term.
        sequence: whether beta times the KL that is still to come is subtracted in Q. This gives the optimum of
            E[R] - beta KL. Without it, the result is the fixed point of a token-local KL.

    Returns:
        `reward`, `kl` (nats per completion) and `objective` (E[R] - beta KL), as means over the prompts.
    """
    reward: Tensor | None = None
    kl: Tensor | None = None
    for i in reversed(range(len(depths))):
        depth = depths[i]
        rewards, kls = depth.reward.clone(), torch.zeros_like(depth.reward)
        if reward is not None and kl is not None:  # These are the values of the states below.
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
