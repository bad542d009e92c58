"""Updates of a real run, as ``verl_on_cpu.recorder`` has written them down, and what they should be by formula."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLIP, DUAL_CLIP = 0.2, 3.0
"""veRL's defaults of the PPO loss."""


@dataclass(frozen=True)
class Update:
    """One mini-batch: the parameters before the update, their gradients, and the rows."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    rows: list[dict[str, Tensor]]

    def flat(self, key: str) -> Tensor:
        """A field of all rows, one number per response token."""
        return torch.cat([row[key] for row in self.rows]).double()


class Updates:
    """All updates of a run.

    Args:
        folder: of the recorder.
        model: folder of the model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.all = [Update(**torch.load(path)) for path in sorted(folder.glob("*.pt"))]

    def log_probs(self, parameters: dict[str, Tensor], rows: list[dict[str, Tensor]]) -> list[Tensor]:
        """Log-probs of the responses under given parameters, one tensor per row."""
        whole = self.distributions(parameters, rows)
        return [
            logp.gather(-1, row["ids"][-len(logp) :].unsqueeze(-1)).squeeze(-1)
            for logp, row in zip(whole, rows, strict=True)
        ]

    def distributions(self, parameters: dict[str, Tensor], rows: list[dict[str, Tensor]]) -> list[Tensor]:
        """Log-probs of all tokens in the states of the responses under given parameters, (T, V) per row."""
        results = []
        for row in rows:
            count = len(row["response_mask"])
            output = torch.func.functional_call(
                self.model, parameters, (), {"input_ids": row["ids"].unsqueeze(0), "use_cache": False}
            )
            results.append(output.logits[0, -count - 1 : -1].log_softmax(-1))
        return results

    def bucketed(self, update: int, k: int) -> float:
        """The mean over the tokens of an update of the KL over the reference's k tokens and one bucket, nats.

        Args:
            update: which one; the reference is the policy before the first.
            k: number of tokens.
        """
        rows = self.all[update].rows
        with torch.no_grad():
            policy, reference = (
                torch.cat(self.distributions(self.all[index].parameters, rows)).double() for index in (update, 0)
            )
        chosen = reference.topk(k, -1).indices
        p, r = policy.gather(-1, chosen).exp(), reference.gather(-1, chosen).exp()
        tail_p, tail_r = 1 - p.sum(-1), 1 - r.sum(-1)
        return float(((p * (p / r).log()).sum(-1) + tail_p * (tail_p / tail_r).log()).mean())

    def under(self, index: int, update: Update) -> Tensor:
        """Log-probs of an update's tokens under the parameters before another update."""
        with torch.no_grad():
            return torch.cat(self.log_probs(self.all[index].parameters, update.rows)).double()

    def generated_by(self, update: int, every: int, tolerance: float = 2e-4) -> list[list[tuple[int, int]]]:
        """For each token of each row, which of the weights that were sent to the sampler may have drawn it.

        Args:
            update: which one.
            every: number of updates between two times that weights are sent.
            tolerance: nats; between the sampler's log-prob of a token and that of the weights which drew it.

        Returns:
            The numbers of the oldest and of the newest weights, which are 0 for those before the first update. They
            differ where several weights give a token the same log-prob.
        """
        this = self.all[update]
        under = torch.stack([self.under(number * every, this) for number in range(update // every + 1)])
        fitting = (under - this.flat("rollout_log_probs")).abs() < tolerance
        assert fitting.any(0).all(), "no weights that were sent gave these log-probs"
        oldest, newest = fitting.int().argmax(0), len(fitting) - 1 - fitting.flip(0).int().argmax(0)
        pairs = iter(zip(oldest.tolist(), newest.tolist(), strict=True))
        return [list(itertools.islice(pairs, len(row["response_mask"]))) for row in this.rows]

    def gradient_error(self, update: int, beta: float, floor: float) -> float:
        """Distance of the recorded gradient from that of PPO's loss plus ``k2@loss/is:token/floor``, relative.

        Args:
            update: which one.
            beta: the coefficient.
            floor: of the weight.
        """
        this = self.all[update]
        parameters = {name: value.clone().requires_grad_() for name, value in this.parameters.items()}
        logp = torch.cat(self.log_probs(parameters, this.rows))
        old, sampler, ref, advantages = (
            torch.cat([row[key] for row in this.rows])
            for key in ("old_log_probs", "rollout_log_probs", "ref_log_prob", "advantages")
        )
        ratio = (logp - old).exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
        policy = torch.maximum(plain, clipped)
        policy = torch.where(advantages < 0, torch.minimum(-advantages * DUAL_CLIP, policy), policy)
        weight = (logp - sampler).detach().exp().clamp_min(floor)
        penalty = weight * (logp - ref).detach() * logp
        (policy + beta * penalty).mean().backward()
        names = list(this.gradients)
        expected = torch.cat([parameters[name].grad.flatten() for name in names])
        found = torch.cat([this.gradients[name].flatten() for name in names])
        return float((found - expected).norm() / expected.norm())
