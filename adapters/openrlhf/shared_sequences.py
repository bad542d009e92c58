"""Policy workers that share their sequences: under tensor parallelism and under ring attention.

All ranks of such a group train on the same micro-batch, and OpenRLHF gives each of them the log-probs of all its
tokens.
"""

from __future__ import annotations

from typing import Any

DATA_PARALLEL = "dp"
"""Name that OpenRLHF gives to the only dimension of its mesh along which ranks have different sequences."""


def is_counted(mesh: Any) -> bool:
    """Whether the tokens of this process belong into sums over all ranks: those of one rank of each group do.

    Args:
        mesh: OpenRLHF's device mesh; its dimensions are ``dp``, ``sp`` (ring attention) and ``tp``.
    """
    position = zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True)
    return all(index == 0 for name, index in position if name != DATA_PARALLEL)
