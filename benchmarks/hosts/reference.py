"""What every host should have computed: the core called directly in float64, and each host's documented aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import BETA, NEAR, Case
from kl_plugins import KLSpec, kl_penalty, kl_term


def pad(rows: list[Tensor], width: int) -> Tensor:
    """(B, T) of tensors of different lengths, zeros behind."""
    return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])


@dataclass(frozen=True)
class Expected:
    """What a case should give.

    Attributes:
        coefficient: (B, T) what multiplies each token's score, per unit beta.
        loss: aggregated KL, nats; None where the KL is no loss.
        gradient: of the KL with respect to all parameters, beta included, flattened.
    """

    coefficient: Tensor
    loss: float | None
    gradient: Tensor


class Oracle:
    """The fixture's float64 side.

    Args:
        folder: what ``benchmarks.hosts.fixture`` wrote.
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
        """(B, 1) what the host multiplies each token of a sequence with, by its documentation."""
        found = sequence_weights(host, aggregation, self.lengths, self.width, micro_batches)
        return torch.tensor(found, dtype=torch.float64).unsqueeze(1)

    def expected(self, host: str, case: Case, micro_batches: list[list[int]] | None = None) -> Expected:
        """A spec's case, as the core has it, aggregated as `host` documents.

        Args:
            host: whose aggregation, and whose site of a KL in the reward.
            case: with a spec.
            micro_batches: sequences of each micro-batch, for aggregations that depend on them.
        """
        spec, weights = KLSpec.parse(case.spec), self.weights(host, case.aggregation, micro_batches)
        current, old = self.log_probs["current"], self.log_probs["model"]
        reference = self.log_probs[case.scenario]
        if spec.placement != "loss":
            penalty = kl_penalty(spec, old, reference, self.mask)
            if spec.placement == "reward":
                penalty = reward_site(host, penalty, self.mask, self.group)
            # The host's policy loss multiplies advantages with its ratio to the policy at rollout time.
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
        """Parameter gradient of beta times the aggregated KL.

        Args:
            coefficient: (B, T) of each token's score.
            weights: (B, 1) of the aggregation.
            exact_weight: (B, T) on the exact KL's own gradient, where it has one.
        """
        found = (BETA * weights * coefficient)[self.mask] @ self.score
        if exact_weight is not None:
            found = found + (BETA * weights * exact_weight)[self.mask] @ self.exact_gradient
        return found

    def flat(self, gradient: dict[str, Tensor]) -> Tensor:
        """A host's gradient by name, in this order of parameters, float64.

        Raises:
            ValueError: another model's names.
        """
        names = [name for name, _ in self.parameters]
        if set(names) != set(gradient):
            raise ValueError(f"the host's parameters differ from the fixture's: {sorted(set(names) ^ set(gradient))}")
        return torch.cat([gradient[name].double().flatten() for name in names])


def sequence_weights(
    host: str, aggregation: str, lengths: list[int], width: int, micro_batches: list[list[int]] | None = None
) -> list[float]:
    """What a host multiplies each token of each sequence with when it sums the KL of one optimizer step.

    See the documentation of ``loss_type`` (TRL), ``loss_agg_mode`` (veRL) and ``aggregate_loss`` (OpenRLHF).

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        aggregation: one of its modes.
        lengths: response tokens per sequence.
        width: the longest that a response may be.
        micro_batches: sequences of each micro-batch; needed for the modes that depend on them: TRL's ``bnpo`` divides
            by the tokens of the micro-batch, veRL's ``seq-mean-token-sum-norm`` by its longest response.

    Raises:
        ValueError: no such mode.
    """
    count, tokens = len(lengths), sum(lengths)
    match host, aggregation:
        case ("trl", "dapo") | ("verl", "token-mean") | ("openrlhf", "token-mean"):
            return [1 / tokens] * count
        case ("trl", "grpo") | ("verl", "seq-mean-token-mean"):
            return [1 / (count * length) for length in lengths]
        case ("trl", "dr_grpo"):
            return [1 / (count * width)] * count
        case ("trl", "luspo") | ("verl", "seq-mean-token-sum"):
            return [1 / count] * count
        case ("trl", "bnpo") if micro_batches is not None:
            shares = {i: sum(lengths[j] for j in batch) * len(micro_batches) for batch in micro_batches for i in batch}
            return [1 / shares[i] for i in range(count)]
        case ("verl", "seq-mean-token-sum-norm") if micro_batches is not None:
            longest = {i: max(lengths[j] for j in batch) for batch in micro_batches for i in batch}
            return [1 / (count * longest[i]) for i in range(count)]
        case _:
            raise ValueError(f"{host} has no aggregation {aggregation!r} that is known here")


def reward_site(host: str, penalty: Tensor, mask: Tensor, group: int) -> Tensor:
    """What each host's group advantage makes of a KL in the reward, per token, without normalisation by the std.

    TRL and veRL sum it over the response and subtract the group's mean; OpenRLHF subtracts the group's mean of the
    task reward alone and sums each token's KL with those that follow.

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        penalty: (B, T) nats per unit beta, 0 outside the mask.
        mask: (B, T).
        group: responses per prompt.
    """
    if host == "openrlhf":
        return penalty.flip(-1).cumsum(-1).flip(-1) * mask
    total = penalty.sum(-1).view(-1, group)
    return (total - total.mean(-1, keepdim=True)).view(-1, 1) * mask
