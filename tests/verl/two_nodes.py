"""Two raylets on one machine, each with room for one worker: do both give receipts, and train together?

Usage: ``python -m tests.verl.two_nodes MODEL [FOLDER_FOR_THE_SECOND_NODES_PYTHONPATH]``
"""

import os
import shutil
import sys
import tempfile

from tests.verl.ray_support import CPU_HOST, ENVIRONMENT

SPEC = "k2@loss/is:token"


def main(path: str, *second: str) -> None:
    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    os.makedirs(os.path.join(folder, "ray"))
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=folder)
    sys.path.append(str(CPU_HOST))
    import ray
    from ray.cluster_utils import Cluster
    from transformers import AutoModelForCausalLM

    from tests.verl import remote
    from tests.verl.workers import Group, make_batch

    room = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
    cluster = Cluster(head_node_args={**room, "include_dashboard": False}, initialize_head=True)
    try:
        cluster.add_node(**room, env_vars={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([*second, str(CPU_HOST)])})
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(remote)
        group = Group(path, 2, packed=False, nodes=2)
        workers = group.workers.workers
        print("nodes", len({ray.get(w.__ray_call__.remote(remote.node_id)) for w in workers}))
        group.use(SPEC)
        step = group.step(make_batch(AutoModelForCausalLM.from_pretrained(path)))
        print("trained", step.metrics["kl/active"])
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
