"""veRL's training workers: ``python -m benchmarks.collectives.verl_run FOLDER RANKS...`` writes ``verl-N.json``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray

from benchmarks.collectives import count
from benchmarks.collectives.plan import MICRO_BATCHES, NATIVE, SPECS
from benchmarks.hosts.verl_update import cluster
from tests.support.verl import assets
from tests.support.verl.workers import PROMPTS, Group, make_batch


class MicroBatches(Group):
    """Every rank accumulates over the same number of micro-batches."""

    def engine(self, ranks: int) -> Any:
        import dataclasses

        size = len(PROMPTS) // ranks // MICRO_BATCHES
        return dataclasses.replace(super().engine(ranks), micro_batch_size_per_gpu=size)


def counted(group: Group, batch: Any, kl: str) -> dict[str, Any]:
    """The collectives of one optimizer step of rank 0."""
    group.use(kl)
    workers = group.workers.workers
    ray.get([worker.__ray_call__.remote(count.start) for worker in workers])
    group.workers.train_mini_batch(batch.tensordict()).get()
    seen = ray.get([worker.__ray_call__.remote(count.stop) for worker in workers])[0]
    return {"seen": seen, "steps": 1, "micro_batches": MICRO_BATCHES, "sequences": len(PROMPTS) // group.ranks}


def main(folder: Path, *ranks: int) -> None:
    """All arms for each number of processes."""
    from transformers import AutoModelForCausalLM

    path = assets.build(folder / "verl") / "model"
    batch = make_batch(AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa"))
    with cluster():
        ray.cloudpickle.register_pickle_by_value(count)
        for number in ranks:
            group = MicroBatches(str(path), number, packed=True)
            found = {kl: counted(group, batch, kl) for kl in (NATIVE["verl"], *SPECS["verl"])}
            group.end()
            (folder / f"verl-{number}.json").write_text(json.dumps({"version": version("verl"), "arms": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
