"""``@reward`` and ``@advantage``: the penalty of a rollout, and what becomes of TRL's rewards and advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import count_not_finite, used
from kl_plugins.adapters.trl.batch import ADVANTAGE_PENALTY, BETA, OLD, PENALTY, REFERENCE, RolloutCalls, Scored
from kl_plugins.adapters.trl.session import Session
from kl_plugins.penalty import kl_penalty

COLUMN = "kl_penalty"
"""Name of the extra reward column in TRL's logs."""


@dataclass
class Rollout(RolloutCalls):
    """A rollout of a score spec, from its generation to the micro-batches that TRL makes of it.

    Attributes:
        session: of the trainer.
        beta: the coefficient of this rollout.
        calls: TRL's log-prob calls: the policy first, unless the data are on-policy, and the reference last.
        penalty: (B, T) per unit beta, nats, once it has been computed.
        written: which tokens of each completion the policy wrote (1) and which came from tools or an environment (0),
            as TRL's generation says; None: all are the policy's.
        task: mean and standard deviation of the task's reward alone, where the KL joins the rewards.
    """

    session: Session
    beta: float
    calls: list[Scored] = field(default_factory=list)
    penalty: Tensor | None = None
    written: list[list[int]] | None = None
    task: tuple[float, float] | None = None

    def charge(self, mask: Tensor | None = None) -> Tensor:
        """Compute the penalty from the log-probs that TRL has just computed.

        Args:
            mask: (B, T) response tokens; by default the response part of the attention mask that TRL scored with,
                without the tokens of tools and environments.

        Returns:
            (B, T) per unit beta, nats.

        Raises:
            LogProbError: a log-prob of policy or reference is not finite, on any rank.
            BetaChangedError: the host's coefficient was changed against the spec's schedule, on any rank.
        """
        session, exact, remainder, score_policy = self.session, None, None, self.session.score_policy
        if session.states is not None:
            states, scored = session.states.of_rollout(self.calls[-1], score_policy, self.kept())
            exact, remainder, session.deviation = states
            policy, reference, attended = policy_and_reference(self.calls, lambda _: scored)
        else:
            policy, reference, attended = policy_and_reference(self.calls, score_policy)
        mask = by_policy(attended, self.written) if mask is None else mask
        entering = used(session.spec, session.behaviour, policy=policy, reference=reference, old=None, sampler=None)
        session.agree(count_not_finite(entering, mask))
        session.passed.add("rollout")
        self.penalty = kl_penalty(session.spec, policy, reference, mask, exact=exact, remainder=remainder)
        return self.penalty

    def gathered(self) -> Tensor:
        """Compute the penalty, and sum it over each completion of all processes.

        Returns:
            (N,) per unit beta, nats.
        """
        found: Tensor = self.session.accelerator.gather(sequence_penalty(self.charge()))
        return found

    def times_beta(self, host_kl: Tensor) -> Tensor:
        """Return beta times the penalty of each completion, in the place of RLOO's own KL; 0 under ``@advantage``.

        Args:
            host_kl: (N,) RLOO's own KL.
        """
        if self.session.spec.placement == "reward":
            return self.beta * self.gathered().to(host_kl)
        self.charge()
        return host_kl.new_zeros(())

    def into_advantages(self, output: dict[str, Any], by_sequence: bool) -> None:
        """Put the penalty into a rollout's advantages, or beside them until the policy's log-probs are there.

        Args:
            output: TRL's rollout.
            by_sequence: one importance ratio per sequence multiplies the advantages.
        """
        assert self.penalty is not None
        if by_sequence:
            output[ADVANTAGE_PENALTY] = self.beta * self.penalty
        else:
            output["advantages"] = per_token(output["advantages"], self.penalty, self.beta)

    def keep(self, output: dict[str, Any], log_probs: bool = False) -> dict[str, Any]:
        """Put what the updates need for their metrics into a rollout.

        Args:
            output: TRL's rollout.
            log_probs: add those of policy and reference as well, which RLOO does not keep.

        Returns:
            The rollout.
        """
        output[PENALTY], output[BETA] = self.penalty, torch.tensor(self.beta, dtype=torch.float64)
        if log_probs:
            output[OLD], output[REFERENCE] = self.calls[0].logp, self.calls[-1].logp
        return output


def policy_and_reference(
    calls: list[Scored], score_policy: Callable[[Scored], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rollout's log-probs under policy and reference, from TRL's calls while it generated.

    TRL scores the policy first, unless the data are on-policy, and the reference last. The model object does not tell
    them apart: under PEFT it is the same one with its adapter off.

    Args:
        calls: what TRL computed, in order.
        score_policy: scores the same tokens under the policy, where TRL did not.

    Returns:
        Policy and reference log-probs, nats, and the response mask; all (B, T).

    Raises:
        RuntimeError: TRL made another number of calls.
    """
    if len(calls) not in (1, 2):
        raise RuntimeError(
            f"kl-plugins: TRL scored the rollout {len(calls)} times where one (reference) or two (policy, reference) "
            "were expected; this trainer is not one that kl-plugins knows"
        )
    reference = calls[-1]
    policy = calls[0].logp if len(calls) == 2 else score_policy(reference)
    return policy, reference.logp, reference.response_mask()


def written_by_policy(generated: Any, required: bool) -> list[list[int]] | None:
    """Return which tokens of each completion the policy wrote, as TRL's ``_generate`` says.

    Args:
        generated: what ``_generate`` returned. The second part is the token ids of each completion. The third part is
            TRL's tool mask, which for a ``rollout_func`` is the ``env_mask`` that it returned.
        required: tools or environments are there, so TRL has to say it.

    Returns:
        For each completion one number per token: 1 for the policy's tokens, 0 for others. None: all are the policy's.

    Raises:
        RuntimeError: the answer has another form.
    """
    completions, written = generated[1:3]
    if written is None and not required:
        return None
    lengths = [len(ids) for ids in completions]
    if written is None or [len(row) for row in written] != lengths:
        raise RuntimeError(
            "kl-plugins: TRL's _generate does not say for each token of each completion whether the policy wrote it, "
            "so a KL in the rewards would be charged for tokens of tools or of the environment; return an env_mask "
            "that is as long as completion_ids, or use @loss or @advantage"
        )
    return [[int(number) for number in row] for row in written]


def by_policy(attended: Tensor, written: list[list[int]] | None) -> Tensor:
    """Leave out the tokens that the policy did not write.

    Args:
        attended: (B, T) bool.
        written: what :func:`written_by_policy` gave.

    Returns:
        (B, T) bool.
    """
    if written is None:
        return attended
    mask = attended.clone()
    for row, numbers in zip(mask, written, strict=True):
        row[: len(numbers)] &= torch.tensor(numbers, device=mask.device).bool()
    return mask


def per_token(advantages: Tensor, penalty: Tensor, beta: float) -> Tensor:
    """Subtract beta times the penalty from advantages, for a host that takes (B, T).

    See arXiv 2601.10201.

    Args:
        advantages: (B,) or (B, T), normalised.
        penalty: (B, T), nats per unit beta.
        beta: coefficient.

    Returns:
        (B, T).
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages - beta * penalty.to(advantages)


def sequence_penalty(penalty: Tensor) -> Tensor:
    """Sum a penalty over the tokens of each completion.

    Args:
        penalty: (B, T), nats per unit beta.

    Returns:
        (B,), nats per unit beta.
    """
    return penalty.sum(-1)


def with_column(rewards_per_func: Tensor, penalty: Tensor) -> Tensor:
    """Add minus the KL of each completion to TRL's rewards, as one more column.

    A completion that no reward function could score stays unscorable: its KL alone is no reason to reinforce it.

    Args:
        rewards_per_func: (N, F) rewards of all processes, NaN where a function gave none.
        penalty: (N,) KL of each completion, nats.

    Returns:
        (N, F + 1).
    """
    unscorable = torch.isnan(rewards_per_func).all(dim=1)
    column = (-penalty.to(rewards_per_func)).masked_fill(unscorable, torch.nan)
    return torch.cat([rewards_per_func, column.unsqueeze(1)], dim=1)


def with_weight(weights: Tensor, beta: float) -> Tensor:
    """Add beta to TRL's reward weights, as the weight of the KL column.

    Args:
        weights: (F,) reward weights.
        beta: coefficient.

    Returns:
        (F + 1,).
    """
    return torch.cat([weights, torch.tensor([beta], dtype=weights.dtype).to(weights.device)])


def task_reward(rewards_per_func: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the weighted task reward, without the KL column, over scorable completions.

    Args:
        rewards_per_func: (N, F) rewards of all processes.
        weights: (F,) reward weights.
    """
    scorable = ~torch.isnan(rewards_per_func).all(dim=1)
    total = (rewards_per_func * weights.to(rewards_per_func)).nansum(dim=1)[scorable]
    mean = total.mean().item() if total.numel() else float("nan")
    return mean, total.std().item() if total.numel() > 1 else float("nan")
