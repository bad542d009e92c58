"""veRL's training workers: ``python -m benchmarks.collectives.verl_run FOLDER RANKS...`` writes ``verl-N.json``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.collectives import count
from benchmarks.collectives.plan import MICRO_BATCHES, NATIVE, SPECS
from benchmarks.drivers import verl
from kl_plugins import KLSpec
from kl_plugins.adapters.top_k import KEY
from kl_plugins.spec.observation import looks_like_observation
from tests.support.verl import assets
from tests.support.verl.workers import PROMPTS, Group, make_batch


def counted(group: Group, batch: Any, kl: str) -> dict[str, Any]:
    """Return the collectives of one optimizer step of rank 0, and the bytes per token that the driver received."""
    from tests.support.verl import roles  # imports veRL, which has to be prepared first

    group.use(kl)
    top = KLSpec.parse(kl).top if "@" in kl and not looks_like_observation(kl) else None
    if top is not None:
        batch = roles.scored(batch, group.workers, top, "infer_batch")
    sent = sum(count.size(row) for row in batch.extra.get(KEY, ()))
    group.ask(count.start)
    group.train(batch)
    return {
        "seen": group.ask(count.stop)[0],
        "steps": 1,
        "micro_batches": MICRO_BATCHES,
        "sequences": len(PROMPTS) // group.ranks,
        "carried": sent / sum(map(len, batch.responses)),
    }


def main(folder: Path, *ranks: int) -> None:
    """Count all arms for each number of processes, and write the results."""
    verl.prepare()
    from transformers import AutoModelForCausalLM

    path = assets.build(folder / "verl") / "model"
    batch = make_batch(AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa"))
    with verl.session(count):
        for number in ranks:
            # Every rank accumulates over the same number of micro-batches.
            group = verl.Workers(str(path), number, micro_batch=len(PROMPTS) // number // MICRO_BATCHES)
            found = {kl: counted(group, batch, kl) for kl in (NATIVE["verl"], *SPECS["verl"])}
            group.end()
            (folder / f"verl-{number}.json").write_text(json.dumps({"version": version("verl"), "arms": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
