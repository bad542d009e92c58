"""A softmax policy over a few tokens in one state, trained on samples of an old copy of itself.

Many independent runs are trained together, each with one row of logits. Runs of different KL specs are paired: they
have the same reference, the same start and the same random numbers. `kl_term` computes the KL term and its gradient
from the log-probs of the sampled tokens, as in a trainer. The divergence is then measured by a sum over all tokens,
without sampling noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins import KLSpec
from kl_plugins.term import kl_term

LOST = 0.01
"""A token is lost if the policy gives it less than this share of the reference's probability."""

CLIP = 0.2
"""Half-width of the clipping of the policy-gradient ratio, as in PPO."""


@dataclass(frozen=True)
class Setting:
    """Everything about a group of runs except the KL spec.

    Attributes:
        optimizer: `adam` (torch's defaults) or `sgd`.
        rate: step size.
        samples: tokens drawn per update; 0 takes the exact expectation over the sampler instead.
        delay: number of updates between renewals of the sampler, which is a copy of the policy.
        lagging: whether the sampler is always the policy of `delay` updates ago, instead of being renewed.
        noise: standard deviation of advantages that are independent of the token, per unit of beta. They give a policy
            gradient that is only noise. It is clipped as in PPO.
        updates: optimizer steps.
        tokens: size of the vocabulary; the reference's logits are standard normal.
        distance: standard deviation of the start's logits around the reference's.
        runs: number of independent runs.
        seed: seed of references, starts and draws.
    """

    optimizer: str = "adam"
    rate: float = 0.2
    samples: int = 1
    delay: int = 64
    lagging: bool = False
    noise: float = 0.0
    updates: int = 300
    tokens: int = 32
    distance: float = 1.0
    runs: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Course:
    """The results of the runs.

    Attributes:
        divergence: (updates + 1, runs) KL(policy || reference), nats.
        lost: (runs,) total reference probability of the tokens that are lost at the end.
    """

    divergence: Tensor
    lost: Tensor


def simulate(spec: KLSpec | None, setting: Setting) -> Course:
    """Train all runs of a setting.

    Args:
        spec: a `@loss` spec of the token horizon; None trains without a KL term.
        setting: all other settings.

    Returns:
        The divergences after each update, and the probability that was lost.

    Raises:
        ValueError: The setting has policy-gradient noise but no samples.
    """
    if setting.noise and not setting.samples:
        raise ValueError("policy-gradient noise needs samples: give samples > 0 or noise = 0")
    shape = (setting.runs, setting.tokens)
    start, draws, luck = (torch.Generator().manual_seed(3 * setting.seed + offset) for offset in range(3))
    reference = torch.randn(shape, generator=start, dtype=torch.float64)
    logits = reference + setting.distance * torch.randn(shape, generator=start, dtype=torch.float64)
    logits.requires_grad_()
    reference = reference.log_softmax(-1)
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[setting.optimizer]([logits], lr=setting.rate)
    past: list[Tensor] = []
    found = []
    for update in range(setting.updates):
        logp = logits.log_softmax(-1)
        past.append(logp.detach())
        found.append(divergence(past[-1], reference))
        then = max(0, update - setting.delay) if setting.lagging else update - update % setting.delay
        sampler = past[then]
        drawn = draw(sampler, setting.samples, draws) if setting.samples else None
        loss = logp.sum() * 0 if spec is None else kl_loss(spec, logp, reference, sampler, drawn)
        if drawn is not None and setting.noise:
            advantages = setting.noise * torch.randn(drawn.shape, generator=luck, dtype=torch.float64)
            loss = loss + policy_loss(advantages, logp.gather(1, drawn), sampler.gather(1, drawn))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logp = logits.detach().log_softmax(-1)
    gone = logp - reference < torch.tensor(LOST).log()
    return Course(torch.stack([*found, divergence(logp, reference)]), (reference.exp() * gone).sum(-1))


def draw(logp: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Draw (runs, samples) tokens by inverse distribution functions, so that equal policies draw equal tokens."""
    cumulated = logp.exp().cumsum(-1)
    heights = torch.rand(len(logp), samples, generator=generator, dtype=logp.dtype) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, heights).clamp_max(logp.shape[1] - 1)


def kl_loss(spec: KLSpec, logp: Tensor, reference: Tensor, sampler: Tensor, drawn: Tensor | None) -> Tensor:
    """Compute the KL loss of each run, and return the sum over runs.

    The loss of a run is the mean over the drawn tokens, or the expectation over the sampler.

    Args:
        spec: a `@loss` spec of the token horizon.
        logp: (runs, tokens) log-probs of the policy, nats, with their autograd graph.
        reference: (runs, tokens) log-probs of the reference, nats.
        sampler: (runs, tokens) log-probs of the sampler, nats.
        drawn: (runs, samples) tokens, or None for the expectation.

    Returns:
        A 0-d tensor, nats.
    """
    exact = divergence(logp, reference)[:, None] if spec.needs_exact else None
    if drawn is None:
        share = sampler.exp()
    else:
        logp, reference, sampler = (given.gather(1, drawn) for given in (logp, reference, sampler))
        share = torch.full_like(sampler, 1 / drawn.shape[1])
    mask = torch.ones_like(logp, dtype=torch.bool)
    exact = None if exact is None else exact.expand_as(logp)
    term = kl_term(spec, logp, reference, mask, sampler_logp=sampler, exact=exact)
    return (share * term.loss).sum()


def policy_loss(advantages: Tensor, logp: Tensor, sampler: Tensor) -> Tensor:
    """Compute PPO's clipped loss as a mean over the draws of each run, and return the sum over runs."""
    ratio = (logp - sampler).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(-1).sum()


def divergence(logp: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy || reference) of each run, nats."""
    return (logp.exp() * (logp - reference)).sum(-1)
