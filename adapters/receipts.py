"""Receipts: how a process makes one, how a trainer asks Ray workers for theirs, and how they reach the log."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from kl_plugins.adapters.base import PATCHES
from kl_plugins.aggregation import Aggregation
from kl_plugins.hosts import Host
from kl_plugins.receipts import MissingReceiptError, Receipt, check_receipts
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation
from kl_plugins.spec.target import caveats_with_source

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "KL_PLUGINS_RECEIPT_TIMEOUT"
DEFAULT_TIMEOUT = 300.0
"""Seconds for all workers to answer; they may still be loading their model."""


@dataclass(frozen=True)
class Statement:
    """What a host's settings make of a spec.

    Attributes:
        aggregation: how the host turns the terms of all tokens into one number.
        behaviour: where the behaviour policy's log-probs come from (``sampler``, ``old``, ``current``, ``unused``).
        sampling: how responses are sampled; None where the process does not know.
        caveats: what bends the estimate because of the host's settings, beside aggregation and sampling.
        reward_site: what the host does with a KL in the reward, or empty.
        cost: what the spec makes the host do beside its own work, or empty.
    """

    aggregation: Aggregation
    behaviour: str = "unused"
    sampling: Sampling | None = None
    caveats: tuple[str, ...] = ()
    reward_site: str = ""
    cost: str = ""


def made(
    host: Host,
    spec: KLSpec,
    statement: Statement,
    wrapped: tuple[tuple[str, ...], str],
    rank: int = 0,
    world_size: int = 1,
    observation: Observation | None = None,
) -> Receipt:
    """Make the receipt of this process.

    Args:
        host: the host.
        spec: what the user named.
        statement: what the host's settings make of it.
        wrapped: names of the wrapped functions that the spec works through, and the digest of their sources.
        rank: of this process in the host's worker group.
        world_size: of that group.
        observation: what the user asked to observe; None where the spec is applied.
    """
    sampling = statement.sampling
    return Receipt(
        rank=rank,
        world_size=world_size,
        host=host.title,
        host_version=version(host.distribution),
        patches=wrapped[0],
        fingerprint=wrapped[1],
        spec=str(spec),
        observes="" if observation is None else str(observation),
        target=spec.target,
        behaviour=statement.behaviour,
        reward_site=statement.reward_site,
        cost=statement.cost,
        aggregation=str(statement.aggregation),
        sampling="" if sampling is None else str(sampling),
        caveats=(
            *caveats_with_source(spec, statement.behaviour),
            *statement.aggregation.caveats,
            *statement.caveats,
            *(() if sampling is None else sampling.caveats(spec, statement.behaviour)),
        ),
    )


def announce(receipt: Receipt) -> None:
    """Log the receipt's line; if no logger shows it, print it to standard error."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", receipt.line())
    else:
        print(receipt.line(), file=sys.stderr, flush=True)


def timeout(default: float = DEFAULT_TIMEOUT) -> float:
    """Seconds to wait for the workers' answers."""
    return float(os.environ.get(TIMEOUT_VARIABLE, default))


def collect(
    ray: Any, workers: Sequence[Any], host: Host, spec: KLSpec | Observation, behaviour: str, remedy: str
) -> list[Receipt]:
    """Ask every worker for its receipt, and check them all.

    Args:
        ray: the module, which only hosts bring along.
        workers: handles of Ray actors, by rank; their number is the number of receipts expected. A worker without
            kl-plugins can answer as well.
        host: the host; ``kl_plugins.patches.<host>.worker`` makes the receipt, in the worker.
        spec: the spec that they should run, or what they should observe.
        behaviour: where the behaviour policy's log-probs come from.
        remedy: what to do about a worker that has no receipt.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    question, module = _question(), f"{PATCHES.format(host=host.name)}.worker"
    pending = [worker.__ray_call__.remote(question, module, str(spec), behaviour) for worker in workers]
    limit = timeout()
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=limit)
    answers = [_answer(ray, ref) if ref in done else {"error": f"no answer within {limit:g} s"} for ref in pending]
    return checked(answers, str(spec), remedy)


def _answer(ray: Any, ref: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = ray.get(ref)
    except ray.exceptions.RayError as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    return answer


def _question() -> Callable[..., dict[str, Any]]:
    """Make the function that runs in a worker.

    It is defined inside another function, so that it is pickled by value: a worker without kl-plugins can run it too.
    """

    def answer(process, module, spec, behaviour):  # type: ignore[no-untyped-def]
        import importlib
        import os
        import socket

        found = {"rank": int(os.environ.get("RANK", -1)), "pid": os.getpid(), "node": socket.gethostname()}
        try:
            receipt = importlib.import_module(module).receipt
        except (ImportError, AttributeError) as error:
            return {**found, "error": f"kl-plugins is not installed there ({type(error).__name__}: {error})"}
        try:
            return {**found, "receipt": receipt(process, spec, behaviour).to_dict()}
        except Exception as error:
            return {**found, "error": f"{type(error).__name__}: {error}"}

    return answer


def checked(answers: Sequence[Mapping[str, Any]], spec: str, remedy: str) -> list[Receipt]:
    """Return the receipts in the workers' answers, after every check.

    Args:
        answers: one per worker, by rank: ``rank``, ``pid``, ``node``, and ``receipt`` (a dict) or ``error`` (a text).
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
