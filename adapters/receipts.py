"""Receipts on their way to the log and to the trainer that asked for them; knows no host and no transport."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kl_plugins.receipts import MissingReceiptError, Receipt, check_receipts

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "KL_PLUGINS_RECEIPT_TIMEOUT"
DEFAULT_TIMEOUT = 300.0
"""Seconds for all workers to answer; they may still be loading their model."""


def timeout() -> float:
    """Seconds to wait for the workers' answers."""
    return float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT))


def announce(receipt: Receipt) -> None:
    """Log the receipt's line; where nothing shows it, it goes to standard error."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", receipt.line())
    else:
        print(receipt.line(), file=sys.stderr, flush=True)


def checked(answers: Sequence[Mapping[str, Any]], spec: str, remedy: str) -> list[Receipt]:
    """The receipts in the workers' answers, after every check.

    Args:
        answers: one per worker, by rank; see :func:`kl_plugins.adapters.probe.probe`.
        spec: what they should run.
        remedy: what to do about a worker that has none.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    receipts, problems = [], []
    for rank, answer in enumerate(answers):
        if "receipt" in answer:
            receipts.append(Receipt.from_dict(answer["receipt"]))
        else:
            whereabouts = f" (pid {answer['pid']} on {answer['node']})" if "pid" in answer else ""
            problems.append(f"rank {answer.get('rank', rank)}{whereabouts}: {answer['error']}")
    if problems:
        raise MissingReceiptError(
            f"kl-plugins: no receipt from {len(problems)} of {len(answers)} workers:\n  "
            + "\n  ".join(problems)
            + f"\nThey would train without {spec}. {remedy}"
        )
    check_receipts(receipts, len(answers))
    return receipts
