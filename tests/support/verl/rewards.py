"""A rollout batch in veRL's form, before its rewards are shaped."""

from __future__ import annotations

import numpy as np
import torch
from verl import DataProto

ROWS, LENGTH, BETA = 6, 5, 0.3


def rollout(seed: int = 0) -> DataProto:
    """Return the batch of three prompts with two responses each."""
    random = torch.Generator().manual_seed(seed)

    def noise(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(ROWS, LENGTH, generator=random)

    lengths = torch.tensor([5, 3, 4, 5, 1, 2])
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    scores = torch.zeros(ROWS, LENGTH)
    scores[torch.arange(ROWS), lengths - 1] = torch.rand(ROWS, generator=random)
    logp = -1.5 + noise(0.3)
    tensors = {
        "old_log_probs": logp,
        "ref_log_prob": logp + noise(0.5),
        "rollout_log_probs": logp + noise(0.01),
        "response_mask": mask,
        "token_level_scores": scores,
        "values": noise(),
    }
    data = DataProto.from_single_dict(tensors)
    data.non_tensor_batch["uid"] = np.array(["a", "a", "b", "b", "c", "c"], dtype=object)
    return data
