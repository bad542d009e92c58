"""Two raylets on one machine, each with room for one rank: do both give receipts, and train together?

Usage: ``python -m tests.support.openrlhf.two_nodes ASSETS [FOLDER_FOR_THE_SECOND_NODES_PYTHONPATH]``
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.support.openrlhf.ray_support import CPU_HOST, ENVIRONMENT, prepare_extensions

FLAGS = ("--algo.kl.use_loss", "--algo.kl.estimator", "k2@loss/is:token")


def main(assets: str, *second: str) -> None:
    prepare_extensions()
    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    os.makedirs(os.path.join(folder, "ray"))
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=folder)
    import ray
    from ray.cluster_utils import Cluster

    from kl_plugins.adapters.openrlhf import attach, launch
    from tests.support.openrlhf import remote
    from tests.support.openrlhf.harness import Harness
    from tests.support.openrlhf.rollouts import make_rollouts

    attach()
    room = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
    cluster = Cluster(head_node_args={**room, "include_dashboard": False}, initialize_head=True)
    try:
        path = os.pathsep.join([*second, str(CPU_HOST)])
        cluster.add_node(**room, env_vars={**ENVIRONMENT, "PYTHONPATH": path})
        cluster.wait_for_nodes()
        os.environ[launch.VARIABLE] = launch.with_hook(os.environ)
        ray.init(address=cluster.address, log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(remote)
        harness = Harness(Path(assets), 2, spread=True)
        trainer = harness.start(FLAGS)
        print("nodes", len(set(harness.ask(remote.node_id))), flush=True)
        for receipt in harness.receipts(trainer):
            print("receipt", receipt.line(), flush=True)
        metrics, _ = harness.train(trainer, make_rollouts(Path(assets) / "model"))
        print("trained", metrics[-1]["kl/active"], flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
