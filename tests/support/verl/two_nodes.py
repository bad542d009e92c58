"""Two raylets on one machine: do workers on both give receipts, and train together?

Usage: ``python -m tests.support.verl.two_nodes train MODEL [FOLDER]`` trains a worker group; ``serve [FOLDER]``
prints the address of a cluster with one fake GPU on each node, which ends with its input. `FOLDER` comes first on the
second node's import path.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.verl.ray_support import CPU_HOST, ENVIRONMENT, SINCE_0_9

SPEC = "k2@loss/is:token"


@contextmanager
def cluster(*second: str, cpus: int, gpus: int) -> Iterator[str]:
    """Address of a cluster of two nodes."""
    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    os.makedirs(os.path.join(folder, "ray"))
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=folder)
    sys.path.append(str(CPU_HOST))
    from ray.cluster_utils import Cluster

    room = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": 80_000_000}
    if gpus and not SINCE_0_9:
        room["resources"] = {"cpu": gpus}  # older veRL asks Ray for a resource called after the device
    nodes = Cluster(head_node_args={**room, "include_dashboard": False}, initialize_head=True)
    try:
        variables = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([*second, str(CPU_HOST)])}
        # An address of its own: programs of this machine belong to the first node.
        nodes.add_node(**room, node_ip_address="127.0.0.2", env_vars=variables)
        nodes.wait_for_nodes()
        yield nodes.address
    finally:
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def train(path: str, *second: str) -> None:
    """One optimizer step of a worker group with a worker on each node."""
    with cluster(*second, cpus=1, gpus=0) as address:
        import ray
        from transformers import AutoModelForCausalLM

        from tests.support.verl import remote
        from tests.support.verl.workers import Group, make_batch

        ray.init(address=address, log_to_driver=False)
        try:
            ray.cloudpickle.register_pickle_by_value(remote)
            group = Group(path, 2, packed=False, nodes=2)
            workers = group.workers.workers
            print("nodes", len({ray.get(w.__ray_call__.remote(remote.node_id)) for w in workers}))
            group.use(SPEC)
            step = group.step(make_batch(AutoModelForCausalLM.from_pretrained(path)))
            print("trained", step.metrics["kl/active"])
        finally:
            ray.shutdown()


def serve(*second: str) -> None:
    """A cluster for a program that connects to it."""
    with cluster(*second, cpus=8, gpus=1) as address:
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    {"train": train, "serve": serve}[sys.argv[1]](*sys.argv[2:])
