"""Two policy workers that share each sequence, by tensor parallelism or by ring attention, beside one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor

from tests.support.openrlhf import assets, harness, remote, ring
from tests.support.openrlhf.command_line import PACKED, parse
from tests.support.openrlhf.harness import Harness, Result
from tests.support.openrlhf.rollouts import make_rollouts

FLAGS: dict[str, Sequence[str]] = {
    "ring attention": ("--ds.ring_attn_size", "2", *PACKED),
    "tensor parallelism": ("--ds.tensor_parallel_size", "2"),
}
"""What makes two ranks share their sequences."""

ROUNDING = {"ring attention": 0.02, "tensor parallelism": 0.06}
"""Largest relative distance of bfloat16 gradients that are added up in another order."""


class Sharing:
    """The actors of two workers and of one, on a model whose two key-value heads can be divided.

    Args:
        mode: a key of ``FLAGS``.
        alone: one policy and one reference actor.
        folder: for the models.
    """

    def __init__(self, mode: str, alone: Harness, folder: Path) -> None:
        self.mode = mode
        self.assets = assets.build(folder, num_key_value_heads=2)
        self.rollouts = make_rollouts(self.assets / "model")
        self.two, self._alone = Harness(self.assets, 2, sharing=2), alone
        self._stand_in = mock.patch.object(harness, "parse", self._parse)

    def __enter__(self) -> Self:
        import ray

        if self.mode == "ring attention":
            ray.cloudpickle.register_pickle_by_value(ring)
            for ask in (self.two.ask, self.two.ask_reference):
                ask(ring.share_without_flash_attention)
        self._stand_in.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stand_in.stop()
        self.two.end()

    def _parse(self, *args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        if parsed.ds.ring_attn_size > 1:
            parsed.ds.attn_implementation = ring.ATTENTION
        return parsed

    def both(self, flags: Sequence[str]) -> tuple[Result, Result]:
        """Train with one worker and with two.

        Args:
            flags: of the host's command line.
        """
        with mock.patch.object(self._alone, "assets", self.assets):
            one = self._alone.run(flags, self.rollouts)
        return one, self.two.run((*flags, *FLAGS[self.mode]), self.rollouts)

    def start(self, flags: Sequence[str]) -> Any:
        """Return the host's trainer of two workers, which have given their receipts."""
        trainer = self.two.start((*flags, *FLAGS[self.mode]))
        self.two.receipts(trainer)
        return trainer

    def distance(self, one: Result) -> float:
        """Return how far the gradient of the two workers' last run is from that of one, relative to its norm.

        A parameter that is divided is put together from the parts of both workers.

        Args:
            one: a run with one optimizer step.
        """
        parts = [gradients for _, gradients in self.two.ask(remote.state)]
        assert one.gradient is not None
        gap = size = 0.0
        for name, whole in one.gradient.items():
            found = _whole([gradients[name] for gradients in parts], whole.shape)
            gap += float((found - whole).square().sum())
            size += float(whole.square().sum())
        return (gap / size) ** 0.5


def _whole(parts: list[Tensor], shape: torch.Size) -> Tensor:
    for dimension, length in enumerate(shape):
        if parts[0].shape[dimension] != length:
            return torch.cat(parts, dimension)
    torch.testing.assert_close(parts[0], parts[1])
    return parts[0]
