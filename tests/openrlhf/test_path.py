"""How many functions of ours a spec passes in OpenRLHF, from the flag to the gradient."""

import ray

from tests.contract import path
from tests.support.openrlhf.command_line import ONE_STEP
from tests.support.openrlhf.harness import LOSS, Harness
from tests.support.openrlhf.rollouts import Rollouts


def test_the_path_of_a_spec_is_short(harness: Harness, rollouts: Rollouts) -> None:
    ray.cloudpickle.register_pickle_by_value(path)
    harness.ask(path.start)
    path.start()
    try:
        # A process parses a text once, so no other test may have used this one.
        trainer = harness.start([*LOSS, "k2@loss/is:token/cap:7", *ONE_STEP])
    finally:
        launching = path.stop()
    harness.receipts(trainer)
    trainer.train_step(rollouts.experiences(), 0)
    functions = path.listed(launching, *harness.ask(path.stop))
    print(f"\n{len(functions)} functions:", *functions, sep="\n  ")
    assert functions[-1] == "term:kl_term"
    assert len(functions) <= path.LIMIT
    assert functions == path.in_guide("OpenRLHF"), "the guide lists other functions"
