"""Receipts of all processes, exchanged before the first update, without a collective that could hang."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from itertools import count

from kl_plugins.adapters.receipts import TIMEOUT_VARIABLE
from kl_plugins.receipts import Receipt, check_receipts

DEFAULT_TIMEOUT = 120.0
"""Seconds that a process waits for the others' receipts; they arrive together, after the host's own model set-up."""

_exchanges = count()


def exchange(receipt: Receipt) -> list[Receipt]:
    """Every process's receipt; checked.

    A process without the hooks gives none and would not take part in a collective, which would then hang. So receipts
    go through the key-value store of ``torch.distributed``, where waiting has an end.

    Args:
        receipt: this process's own.

    Raises:
        MissingReceiptError: a rank gave none in time, or runs something else.
    """
    receipts = _through_store(receipt) if receipt.world_size > 1 else [receipt]
    check_receipts(receipts, receipt.world_size)
    return receipts


def _through_store(receipt: Receipt) -> list[Receipt]:
    import torch.distributed as dist

    if not dist.is_initialized():
        # No process group to have a store (TPU): the launcher's own collective is all there is.
        from accelerate.utils import gather_object

        return [Receipt.from_dict(data) for data in gather_object([receipt.to_dict()])]
    store = dist.distributed_c10d._get_default_store()
    prefix = f"kl_plugins/receipt/{next(_exchanges)}"
    store.set(f"{prefix}/{receipt.rank}", json.dumps(receipt.to_dict()))
    limit = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT))
    found = []
    for rank in range(receipt.world_size):
        key = f"{prefix}/{rank}"
        try:
            # One rank uses up the whole limit; the rest have had that long to arrive.
            store.wait([key], timedelta(seconds=limit))
        except (RuntimeError, TimeoutError):  # DistStoreError, or what older stores raise
            limit = 0.1
            continue
        found.append(Receipt.from_dict(json.loads(store.get(key))))
    return found
