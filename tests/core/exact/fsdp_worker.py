"""One of two processes whose model is sharded by FSDP2; started as ``fsdp_worker RANK SIZE RENDEZVOUS OUTPUT``.

The KL is computed inside the model's forward pass, where its head is whole; the gradient comes back sharded.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kl_plugins import linear_kl
from tests.core.exact.processes import finish

TOKENS, WIDTH, VOCAB = 6, 8, 40


class Policy(nn.Module):
    """A layer and a head; its forward pass gives the KL to a reference."""

    def __init__(self, frozen_head: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(not frozen_head)

    def forward(self, inputs: Tensor, reference: Policy, labels: Tensor) -> Tensor:
        """(N,) KL of each row."""
        with torch.no_grad():
            ref_hidden = reference.layer(inputs)
        hidden = self.layer(inputs)
        return linear_kl(hidden, self.head.weight, ref_hidden, reference.head.weight, labels).kl


def problem(rank: int, frozen_head: bool) -> tuple[Policy, Policy, Tensor, Tensor]:
    """Policy, reference, this rank's inputs and labels; the models are the same on every rank."""
    torch.manual_seed(0)
    policy, reference = Policy(frozen_head), Policy()
    torch.manual_seed(1 + rank)
    return policy, reference, torch.randn(TOKENS, WIDTH), torch.randint(VOCAB, (TOKENS,))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def main() -> None:
    """Save this rank's KL and the averaged gradients, with and without a frozen head."""
    rank, size, rendezvous, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    saved = {}
    for frozen_head in (False, True):
        policy, reference, inputs, labels = problem(rank, frozen_head)
        fully_shard(policy.layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)  # the head is in the outermost group, whole until the forward pass ends
        kl = policy(inputs, reference, labels)
        kl.mean().backward()
        saved[frozen_head] = {"kl": kl.detach(), "gradients": gradients(policy)}
    finish(saved, output)


if __name__ == "__main__":
    main()
