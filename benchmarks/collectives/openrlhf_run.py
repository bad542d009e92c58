"""OpenRLHF's actors: ``python -m benchmarks.collectives.openrlhf_run FOLDER RANKS...`` writes ``openrlhf-N.json``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.collectives import count
from benchmarks.collectives.plan import MICRO_BATCHES, NATIVE, SPECS
from benchmarks.drivers import openrlhf
from kl_plugins.adapters.top_k import KEY
from tests.support.openrlhf import assets
from tests.support.openrlhf.command_line import ONE_STEP
from tests.support.openrlhf.harness import Harness
from tests.support.openrlhf.rollouts import PROMPTS, Rollouts, make_rollouts


def counted(host: Harness, rollouts: Rollouts, kl: str) -> dict[str, Any]:
    """Return the collectives of one optimizer step of rank 0, and the bytes per token that the driver received."""
    flags = [*ONE_STEP, "--algo.advantage.estimator", "dr_grpo"]
    flags += ["--train.micro_batch_size", str(len(PROMPTS) // host.ranks // MICRO_BATCHES)]
    flags += openrlhf.kl_flags(kl, in_loss="@" not in kl or "@loss" in kl)
    trainer = host.start(flags)
    host.receipts(trainer) if "@loss" in kl else None
    host.ask(count.start)
    _, experiences = host.train(trainer, rollouts)
    sent = sum(part.nbytes for experience in experiences for part in experience.info.get(KEY, []))
    return {
        "seen": host.ask(count.stop)[0],
        "steps": 1,
        "micro_batches": MICRO_BATCHES,
        "sequences": len(PROMPTS) // host.ranks,
        "carried": sent / sum(int(experience.action_mask.sum()) for experience in experiences),
    }


def main(folder: Path, *ranks: int) -> None:
    """Count all arms for each number of processes, and write the results."""
    openrlhf.prepare()
    path = assets.build(folder / "openrlhf")
    rollouts = make_rollouts(path / "model")
    for number in ranks:
        with openrlhf.session(count):
            host = Harness(path, number)
            found = {kl: counted(host, rollouts, kl) for kl in (NATIVE["openrlhf"], *SPECS["openrlhf"])}
            host.end()
        (folder / f"openrlhf-{number}.json").write_text(json.dumps({"version": version("openrlhf"), "arms": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
