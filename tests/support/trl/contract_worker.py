"""One of two processes that answer the contract's requests, until told to stop: ``worker MODEL FOLDER PARENT``.

A request is ``request-N`` in the folder, a pickled :class:`tests.contract.driver.Request`; each rank answers with
``answer-N-RANK``, a pickled :class:`tests.contract.driver.Outcome`. A file ``stop`` ends it, as does the end of the
process that started it.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from itertools import count
from pathlib import Path

from kl_plugins.adapters.trl.processes import end_process_group
from tests.support.trl.contract_batch import outcome


def alive(process: int) -> bool:
    """Whether a process is still there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def main(model: str, folder: Path, parent: int) -> None:
    """Answer requests in their order."""
    rank = os.environ["RANK"]
    for number in count():
        request = folder / f"request-{number}"
        while not request.exists():
            if (folder / "stop").exists() or not alive(parent):
                return
            time.sleep(0.02)
        answer = outcome(pickle.loads(request.read_bytes()), model, folder / "out")
        draft = folder / f"draft-{rank}"
        draft.write_bytes(pickle.dumps(answer))
        draft.rename(folder / f"answer-{number}-{rank}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    end_process_group()
