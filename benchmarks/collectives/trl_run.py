"""One of TRL's processes: ``torchrun ... -m benchmarks.collectives.trl_run FOLDER``; rank 0 writes ``trl-N.json``."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.collectives.count import Counter
from benchmarks.collectives.plan import MICRO_BATCHES, NATIVE, SPECS
from benchmarks.drivers import trl
from kl_plugins.adapters.trl.processes import end_process_group
from tests.support.trl import trainers

STEPS = 2
SEQUENCES = 4
"""Number of sequences per rank and optimizer step."""


def counted(model: str, folder: Path, spec: str) -> dict[str, Any]:
    """Return the collectives of a short run with a spec, or with TRL's own k3."""
    given = {"kl": spec} if spec else {"use_bias_correction_kl": False}
    torch.manual_seed(0)
    trainer = trainers.build(
        *trl.classes(spec), model, folder, max_steps=STEPS, per_device_train_batch_size=SEQUENCES // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES, num_generations=2, num_iterations=1, **given,
    )  # fmt: skip
    with Counter() as counter:
        trainer.train()
    return {"seen": counter.seen, "steps": STEPS, "micro_batches": MICRO_BATCHES, "sequences": SEQUENCES}


def main(folder: Path) -> None:
    """Count all arms, and write the results."""
    trl.stay_on_the_cpu()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work = folder / f"trl-rank{rank}of{ranks}"
    model = trainers.build_model(work / "model")
    found = {spec or NATIVE["trl"]: counted(model, work / "out", spec) for spec in ("", *SPECS["trl"])}
    if rank == 0:
        (folder / f"trl-{ranks}.json").write_text(json.dumps({"version": version("trl"), "arms": found}))
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
