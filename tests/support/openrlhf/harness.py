"""OpenRLHF's real trainer on fixed rollouts: everything but vLLM.

What runs is the host's own code, in real Ray actors where the host has them there: the command line parsed by
``openrlhf.cli.train_ppo_ray``, ``PolicyModelActor`` and ``ReferenceModelActor`` with DeepSpeed ZeRO-2 on gloo, and in
this process ``BasePPOTrainer.train_step``, which makes the experience (``RemoteExperienceMaker``), trains
(``ActorPPOTrainer.ppo_train``) and updates the host's KL controller. Two equal runs give equal bits.

In a test, with the fixtures ``harness`` and ``rollouts`` of the conftest::

    result = harness.run(["--algo.kl.estimator", "k2@loss/is:token", "--algo.kl.use_loss"], rollouts)
    result.parameters  # name -> float32 master weights of DeepSpeed after all optimizer steps
    result.metrics[-1]  # what the host logs, of the last train_step
    result.gradient  # name -> gradient, where exactly one optimizer step was made, else None
    result.receipts  # of every policy actor, for a spec

Results of the host's own settings, from processes without kl-plugins, are in the fixture ``stock``.

The defaults make 4 optimizer steps: 8 rollouts, 4 per step, 2 per micro-batch, 2 epochs. ``ONE_STEP`` makes one of
all 8. Policy and reference differ from the start, so that every KL is away from 0. Actors are reused: each run
initialises the host's model, optimizer and trainer again inside them, by the host's ``init_model_from_pretrained``.

As a program it runs many cases without kl-plugins, for results to compare with::

    python -m tests.support.openrlhf.harness ASSETS OUTPUT.pt < CASES.json   # {"name": ["--flag", "value", ...], ...}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support.openrlhf import remote
from tests.support.openrlhf.command_line import ONE_STEP, parse
from tests.support.openrlhf.rollouts import Rollouts, make_rollouts

__all__ = ["LOSS", "ONE_STEP", "STOCK", "Harness", "Result", "Rollouts", "make_rollouts", "parse"]

LOSS = ("--algo.kl.use_loss", "--algo.kl.estimator")
ONE_STEP_STOCK = "k3 loss, one step"
"""The entry of ``STOCK`` whose gradient is known."""
STOCK: dict[str, Sequence[str]] = {
    "k1": ("--algo.kl.estimator", "k1"),
    "k1 group_norm": ("--algo.kl.estimator", "k1", "--algo.advantage.estimator", "group_norm"),
    "k2 loss": (*LOSS, "k2"),
    "k3 loss": (*LOSS, "k3"),
    "k2 loss unbiased": (*LOSS, "k2", "--algo.kl.unbiased_gradient"),
    "k1 loss unbiased": (*LOSS, "k1", "--algo.kl.unbiased_gradient"),
    ONE_STEP_STOCK: (*LOSS, "k3", *ONE_STEP),
}
"""What the fixture ``stock`` runs without kl-plugins."""


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        metrics: what the host logs of each ``train_step``.
        parameters: DeepSpeed's float32 master weights by name, after all optimizer steps.
        gradient: by name, from Adam's first moment; None unless exactly one optimizer step was made.
        experiences: of the last ``train_step``, the list that the host's experience maker returned.
        trainer: the host's ``BasePPOTrainer``.
        receipts: of every policy actor; empty for the host's own estimators.
    """

    metrics: list[dict[str, Any]]
    parameters: dict[str, Tensor]
    gradient: dict[str, Tensor] | None
    experiences: list[Any] = field(repr=False)
    trainer: Any = field(repr=False)
    receipts: list[Any] = field(repr=False, default_factory=list)


class Harness:
    """Policy and reference actors of the host; Ray must be initialised.

    Args:
        assets: what :func:`tests.support.openrlhf.assets.build` wrote.
        ranks: number of policy actors, and of reference actors.
        spread: put every rank on a node of its own.
        attached: the cluster is one of ``local_cluster(attached=True)``.
        sharing: how many ranks share each sequence, by tensor parallelism or ring attention.
    """

    def __init__(
        self, assets: Path, ranks: int = 1, *, spread: bool = False, attached: bool = True, sharing: int = 1
    ) -> None:
        import ray
        from openrlhf.trainer.ray.launcher import RayActorGroup, ReferenceModelActor
        from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
        from ray.util.placement_group import placement_group

        self.assets, self.ranks, self.attached, self.ended = assets, ranks, attached, False
        # No GPU is asked for, so that Ray needs no fake ones; bundles only hold ranks together or apart.
        bundles = placement_group([{"CPU": 1}] * ranks, strategy="STRICT_SPREAD" if spread else "PACK")
        ray.get(bundles.ready(), timeout=120)

        def group(kind: Any) -> Any:
            return RayActorGroup(1, ranks, kind, pg=bundles, num_gpus_per_actor=0, duplicate_actors=sharing)

        self.policy, self.reference = group(PolicyModelActor), group(ReferenceModelActor)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(actor, *arguments)`` inside every policy actor; its answers by rank."""
        import ray

        return ray.get([actor.__ray_call__.remote(function, *arguments) for actor in self.policy._actor_handlers])

    def ask_reference(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(actor, *arguments)`` inside every reference actor; its answers by rank."""
        import ray

        return ray.get([actor.__ray_call__.remote(function, *arguments) for actor in self.reference._actor_handlers])

    def start(self, flags: Sequence[str], schedule: int = 50) -> Any:
        """Parse `flags`, initialise every model again, and return the host's trainer of them (in this process).

        Args:
            flags: of the host's command line.
            schedule: optimizer steps that the learning rate's schedule is made for.
        """
        import ray
        from openrlhf.trainer.ppo_trainer import BasePPOTrainer
        from openrlhf.utils import get_strategy, get_tokenizer

        ranks = [str(self.ranks)]
        flags = ["--actor.num_gpus_per_node", *ranks, "--ref.num_gpus_per_node", *ranks, *flags]
        args = parse(self.assets, flags, attached=self.attached)
        strategy = get_strategy(args)
        path = args.actor.model_name_or_path
        ray.get(self.policy.async_init_model_from_pretrained(strategy, path, schedule, None))
        ray.get(self.reference.async_init_model_from_pretrained(strategy, str(self.assets / "reference")))
        tokenizer = get_tokenizer(path, None, "left", strategy)
        return BasePPOTrainer(strategy, self.policy, None, None, self.reference, None, tokenizer)

    def receipts(self, trainer: Any) -> list[Any]:
        """Ask every policy actor for its receipt, as the host's ``fit`` does under the plugin before anything else."""
        if not {"@", "/"} & set(trainer.args.algo.kl.estimator):  # neither a spec nor observe
            return []
        from kl_plugins.adapters.openrlhf import require_receipts

        return require_receipts(self.policy, trainer.args)

    def run(self, flags: Sequence[str], rollouts: Rollouts, *, steps: int = 1) -> Result:
        """Train from the initial weights.

        Args:
            flags: of the host's command line, over the defaults above.
            rollouts: the same in every step.
            steps: number of ``train_step`` calls; each makes all the optimizer steps that `flags` ask for.
        """
        trainer = self.start(flags)
        self.ask(remote.name_reference, str(self.assets / "reference"))
        receipts = self.receipts(trainer)
        metrics, experiences = self.train(trainer, rollouts, steps=steps)
        parameters, gradient = self.ask(remote.state)[0]
        return Result(metrics, parameters, gradient, experiences, trainer, receipts)

    def train(self, trainer: Any, rollouts: Rollouts, *, steps: int = 1) -> tuple[list[dict[str, Any]], list[Any]]:
        """`steps` calls of the trainer's ``train_step``: what it logs, and the last experiences."""
        made: list[Any] = []
        original = trainer.experience_maker.make_experience_batch

        def keep(samples: Any) -> Any:
            made[:] = original(samples)
            return made

        with mock.patch.object(trainer.experience_maker, "make_experience_batch", keep):
            return [trainer.train_step(rollouts.experiences(), step)[0] for step in range(steps)], made

    def end(self) -> None:
        """Kill the actors."""
        import ray

        self.ended = True
        for actor in self.policy._actor_handlers + self.reference._actor_handlers:
            ray.kill(actor)


def main(assets: str, output: str) -> None:
    from tests.support.openrlhf.ray_support import local_cluster

    folder = Path(assets)
    with local_cluster():
        harness, rollouts = Harness(folder, attached=False), make_rollouts(folder / "model")
        found = {}
        for name, flags in json.load(sys.stdin).items():
            result = harness.run(flags, rollouts)
            assert not any(harness.ask(remote.imported)), "these are to be processes without kl-plugins"
            found[name] = {"metrics": result.metrics, "parameters": result.parameters, "gradient": result.gradient}
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
