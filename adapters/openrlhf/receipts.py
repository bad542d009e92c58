"""Receipts of every policy worker, and their controllers' state, by remote call through OpenRLHF's own actor group."""

from __future__ import annotations

from typing import Any

from kl_plugins.adapters.openrlhf.settings import behaviour_source
from kl_plugins.adapters.ray_workers import ask
from kl_plugins.adapters.receipts import checked
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec

WORKER = "kl_plugins.patches.openrlhf.worker"
"""Where a worker's receipt is made."""

REMEDY = (
    "Install the same kl-plugins on every node, in the environment that Ray's workers run in, start the run with "
    "`kl-plugins run`, and start again."
)


def collect(actor_group: Any, spec: KLSpec, args: Any) -> list[Receipt]:
    """Ask every worker for its receipt and check them all.

    Args:
        actor_group: OpenRLHF's ``RayActorGroup`` of policy workers; its size is the number of receipts expected.
        spec: the ``@loss`` spec that they should run.
        args: OpenRLHF's nested arguments.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    import ray

    answers = ask(ray, actor_group._actor_handlers, WORKER, str(spec), behaviour_source(spec, args))
    return checked(answers, str(spec), REMEDY)
