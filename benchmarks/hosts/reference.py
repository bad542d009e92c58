"""The expected results of every host: direct calls of the core in float64, with each host's documented aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import BETA, NEAR, Case
from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.adapters.aggregations import Rule, token_weights
from kl_plugins.adapters.trl.explained.defaults import RULES as TRL
from kl_plugins.adapters.verl.explained.defaults import RULES as VERL

MODES: dict[str, dict[str, Rule]] = {"trl": TRL, "verl": VERL, "openrlhf": {"token-mean": "batch"}}
"""How much each token counts, by host and by the host's name of the mode."""


def pad(rows: list[Tensor], width: int) -> Tensor:
    """Return tensors of different lengths as one tensor (B, T), padded with zeros at the end."""
    return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])


@dataclass(frozen=True)
class Expected:
    """The expected results of a case.

    Attributes:
        coefficient: (B, T) factor of each token's score (gradient of its log-prob), per unit of beta.
        loss: aggregated KL, nats; None if the KL is not in the loss.
        gradient: gradient of beta times the KL with respect to all parameters, flattened.
    """

    coefficient: Tensor
    loss: float | None
    gradient: Tensor


class Oracle:
    """The float64 reference for a fixture.

    Args:
        folder: the folder that ``benchmarks.hosts.fixture`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        found = torch.load(folder / "oracle.pt")
        log_probs: dict[str, list[Tensor]] = found["log_probs"]
        self.lengths = [len(row) for row in log_probs["current"]]
        self.width = max(self.lengths)
        self.mask = torch.arange(self.width) < torch.tensor(self.lengths)[:, None]
        self.log_probs = {name: pad(rows, self.width) for name, rows in log_probs.items()}
        self.sampler = pad(found["sampler"], self.width)
        self.exact = pad(found["exact"], self.width)
        self.score: Tensor = found["score"]
        self.exact_gradient: Tensor = found["exact_gradient"]
        self.parameters: list[tuple[str, tuple[int, ...]]] = found["parameters"]
        self.group: int = found["group"]

    def weights(self, host: str, aggregation: str, micro_batches: list[list[int]] | None = None) -> Tensor:
        """Return the factor (B, 1) of each token of a sequence in the host's aggregation, as the host documents it."""
        found = sequence_weights(host, aggregation, self.lengths, self.width, micro_batches)
        return torch.tensor(found, dtype=torch.float64).unsqueeze(1)

    def expected(self, host: str, case: Case, micro_batches: list[list[int]] | None = None) -> Expected:
        """Compute the expected results of a case with a spec, from the core and the documented aggregation of `host`.

        Args:
            host: the host whose aggregation is used, and whose treatment of a KL in the reward.
            case: a case with a spec.
            micro_batches: sequences of each micro-batch, for aggregations that depend on them.
        """
        spec, weights = KLSpec.parse(case.spec), self.weights(host, case.aggregation, micro_batches)
        current, old = self.log_probs["current"], self.log_probs["model"]
        reference = self.log_probs[case.scenario]
        if spec.placement != "loss":
            penalty = kl_penalty(spec, old, reference, self.mask)
            if spec.placement == "reward":
                penalty = reward_site(host, penalty, self.mask, self.group)
            # The host's policy loss multiplies advantages by the ratio of the current policy to the rollout policy.
            coefficient = (current - old).exp() * penalty * self.mask
            return Expected(coefficient, None, self.gradient(coefficient, weights))
        exact = self.exact if spec.needs_exact else None
        if exact is not None and case.scenario != NEAR:
            raise ValueError("the fixture has exact KLs of the near reference only")
        given: dict[str, Any] = {"old_logp": old, "sampler_logp": self.sampler, "exact": exact}
        term = kl_term(spec, current, reference, self.mask, **given)
        own = term.weight if spec.estimator == "exact" else None
        gradient = self.gradient(term.coefficient, weights, own)
        return Expected(term.coefficient, (term.value * weights).sum().item(), gradient)

    def gradient(self, coefficient: Tensor, weights: Tensor, exact_weight: Tensor | None = None) -> Tensor:
        """Compute the parameter gradient of beta times the aggregated KL.

        Args:
            coefficient: (B, T) factor of each token's score (gradient of its log-prob).
            weights: (B, 1) weights of the aggregation.
            exact_weight: (B, T) weight of the exact KL's own gradient; None if the spec has no exact own term.
        """
        found = (BETA * weights * coefficient)[self.mask] @ self.score
        if exact_weight is not None:
            found = found + (BETA * weights * exact_weight)[self.mask] @ self.exact_gradient
        return found

    def flat(self, gradient: dict[str, Tensor]) -> Tensor:
        """Flatten a host's gradient by name, in the fixture's order of parameters, float64.

        Raises:
            ValueError: if the names are those of another model.
        """
        names = [name for name, _ in self.parameters]
        if set(names) != set(gradient):
            raise ValueError(f"the host's parameters differ from the fixture's: {sorted(set(names) ^ set(gradient))}")
        return torch.cat([gradient[name].double().flatten() for name in names])


def sequence_weights(
    host: str, aggregation: str, lengths: list[int], width: int, micro_batches: list[list[int]] | None = None
) -> list[float]:
    """Return the factor of each token of each sequence when a host sums the KL of one optimizer step.

    See the documentation of ``loss_type`` (TRL), ``loss_agg_mode`` (veRL) and ``aggregate_loss`` (OpenRLHF).

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        aggregation: one of the host's modes.
        lengths: response tokens per sequence.
        width: largest possible length of a response.
        micro_batches: sequences of each micro-batch. They are needed for the modes that depend on them: TRL's ``bnpo``
            divides by the tokens of the micro-batch, veRL's ``seq-mean-token-sum-norm`` by its longest response.

    Raises:
        ValueError: if the host has no such mode.
    """
    rule = MODES.get(host, {}).get(aggregation)
    if rule is None or (rule in ("micro-batch", "longest") and micro_batches is None):
        raise ValueError(f"{host} has no aggregation {aggregation!r} that is known here")
    return token_weights(rule, lengths, width, micro_batches)


def reward_site(host: str, penalty: Tensor, mask: Tensor, group: int) -> Tensor:
    """Return the effect per token of a KL in the reward on each host's group advantage, without division by the std.

    TRL and veRL sum the KL over the response and subtract the group's mean. OpenRLHF subtracts the group's mean of the
    task reward alone, and adds to each token's KL the KL of all following tokens.

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        penalty: (B, T) nats per unit of beta, 0 outside the mask.
        mask: (B, T), True on response tokens.
        group: number of responses per prompt.
    """
    if host == "openrlhf":
        return penalty.flip(-1).cumsum(-1).flip(-1) * mask
    total = penalty.sum(-1).view(-1, group)
    return (total - total.mean(-1, keepdim=True)).view(-1, 1) * mask
