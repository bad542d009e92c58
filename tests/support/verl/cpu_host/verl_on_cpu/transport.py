"""The weight transport ``mailbox``: from trainer to engine through Ray's object store, on any machine.

veRL's own transports between processes need an accelerator. This one is in veRL's public registry, and
``checkpoint_engine.custom_backend_module`` names this module.
"""

import asyncio

import ray
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

NAME = "mailbox"


class Mailbox:
    """Holds the weights of one synchronisation."""

    def __init__(self):
        self.weights, self.there = None, asyncio.Event()

    async def put(self, weights):
        self.weights = weights
        self.there.set()

    async def get(self):
        await self.there.wait()
        return self.weights


@CheckpointEngineRegistry.register(NAME)
class MailboxEngine(CheckpointEngine):
    """The trainer's first rank makes a mailbox for each synchronisation, and all engines read from it."""

    def __init__(self, bucket_size, is_master=False):
        self.is_master, self.mailbox = is_master, None

    def prepare(self):
        return ray.remote(Mailbox).options(num_cpus=0).remote() if self.is_master else None

    @classmethod
    def build_topology(cls, actor_wg_world_size, rollout_world_size, metadata):
        (mailbox,) = filter(None, metadata)
        return {"mailbox": [mailbox] * actor_wg_world_size}, {"mailbox": [mailbox] * rollout_world_size}

    def init_process_group(self, mailbox):
        self.mailbox = mailbox

    def finalize(self):
        self.mailbox = None

    async def send_weights(self, weights, global_steps=None):
        # All ranks go through the generator, because each tensor is gathered from all of them.
        named = {name: weight.detach().float().cpu().clone() for name, weight in weights}
        if self.is_master:
            await self.mailbox.put.remote(named)

    async def receive_weights(self, global_steps=None):
        for name, weight in (await self.mailbox.get.remote()).items():
            yield name, weight
