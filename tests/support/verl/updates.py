"""Updates of a real run, as ``verl_on_cpu.recorder`` has written them down, and what they should be by formula."""

from __future__ import annotations

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
        results = []
        for row in rows:
            count = len(row["response_mask"])
            output = torch.func.functional_call(
                self.model, parameters, (), {"input_ids": row["ids"].unsqueeze(0), "use_cache": False}
            )
            logp = output.logits[0, -count - 1 : -1].log_softmax(-1)
            results.append(logp.gather(-1, row["ids"][-count:].unsqueeze(-1)).squeeze(-1))
        return results

    def under(self, index: int, update: Update) -> Tensor:
        """Log-probs of an update's tokens under the parameters before another update."""
        with torch.no_grad():
            return torch.cat(self.log_probs(self.all[index].parameters, update.rows)).double()

    def generated_by(self, update: int, every: int, tolerance: float = 2e-4) -> list[list[int]]:
        """For each row, how many times weights had been sent to the sampler when each of its tokens was drawn.

        Args:
            update: which one.
            every: number of updates between two times that weights are sent.
            tolerance: nats; between the sampler's log-prob of a token and that of the weights which drew it.
        """
        this = self.all[update]
        # The newest first: where two versions agree on a token, it is the newer one's.
        sent = range(update // every, -1, -1)
        under = torch.stack([self.under(number * every, this) for number in sent])
        differences = (under - this.flat("rollout_log_probs")).abs()
        assert differences.amin(0).max() < tolerance, "no weights that were sent gave these log-probs"
        drawn = (update // every - (differences < tolerance).int().argmax(0)).tolist()
        lengths = [len(row["response_mask"]) for row in this.rows]
        return [[drawn.pop(0) for _ in range(length)] for length in lengths]

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
