"""The rollout engine ``transformers_cpu``: one Ray actor per replica that samples from a transformers model.

Like veRL's own engines it stops in the middle of a response when requests are aborted, returns the tokens so far, and
lets new requests wait until generation goes on.

Environment: ``SAMPLER_SHARPNESS`` scales the sampler's logits, so that it differs from the trainer's policy;
``SAMPLER_NAN=N`` makes the first log-prob of every response NaN, once the sampler has the weights of N updates;
``SAMPLER_SECONDS`` is how long the sampler waits before each token, on average: requests differ in their speed.
"""

import asyncio
import os

import ray
import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "transformers_cpu"


def register():
    _ROLLOUT_REGISTRY[NAME, "async"] = "verl_on_cpu.rollout.WeightSender"
    RolloutReplicaRegistry.register(NAME, lambda: Replica)


def actor_name(rank):
    return f"{NAME}_{rank}"


async def _collected(weights):
    """Names and copies of weights that come from a generator of either kind."""
    if hasattr(weights, "__aiter__"):
        return {name: weight.detach().float().cpu().clone() async for name, weight in weights}
    return {name: weight.detach().float().cpu().clone() for name, weight in weights}


class Sampler:
    """Samples token by token; veRL's server methods that have nothing to do on a CPU are accepted and ignored."""

    def __init__(self, path, response_length, rank):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.response_length, self.global_steps = response_length, None
        self.generator = torch.Generator().manual_seed(rank + 1)
        self.sharpness = float(os.environ.get("SAMPLER_SHARPNESS", "1"))
        self.broken_after = float(os.environ.get("SAMPLER_NAN", "inf"))
        self.seconds = float(os.environ.get("SAMPLER_SECONDS", "0"))
        self.going, self.rejecting, self.aborts = asyncio.Event(), False, 0
        self.going.set()

    async def node_address(self):
        return ray.util.get_node_ip_address()

    async def update_weights(self, weights, global_steps=None):
        _, unknown = self.model.load_state_dict(weights, strict=False)
        if unknown:
            raise ValueError(f"weights of another model: {unknown}")
        self.global_steps = self.global_steps if global_steps is None else global_steps

    async def set_global_steps(self, global_steps):
        self.global_steps = global_steps

    async def _ignored(self, *args, **kwargs):
        return None

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _ignored
    start_profile = stop_profile = _ignored

    async def abort_all_requests(self, reject_request=False):
        self.rejecting, self.aborts = reject_request, self.aborts + 1
        self.going.clear()

    async def resume_generation(self):
        self.rejecting = False
        self.going.set()

    async def generate(self, prompt_ids, sampling_params, request_id, **unused):
        if not self.rejecting:
            await self.going.wait()
        version = self.global_steps  # until the tokens are returned there may be other weights
        tokens, log_probs, reason = await self._sample(torch.tensor([list(prompt_ids)]), sampling_params)
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs if sampling_params.get("logprobs") else None,
            stop_reason=reason,
            num_preempted=0,
            extra_fields={"global_steps": version if tokens else None},
        )

    async def _sample(self, ids, params):
        temperature = float(params.get("temperature", 1.0))
        limit = int(params.get("max_tokens") or self.response_length)
        tokens, log_probs, cache, aborts = [], [], None, self.aborts
        broken = (self.global_steps or 0) >= self.broken_after
        seconds = 2 * self.seconds * float(torch.rand((), generator=self.generator)) if self.seconds else 0.0
        while len(tokens) < limit:
            await asyncio.sleep(seconds)
            if self.rejecting or self.aborts > aborts:
                return tokens, log_probs, "aborted"
            token, logp, cache = self._next(ids, temperature, cache)
            tokens.append(token)
            log_probs.append(float("nan") if broken and not log_probs else logp)
            if token == self.model.config.eos_token_id:
                break
            ids = torch.tensor([[token]])
        return tokens, log_probs, "completed"

    @torch.no_grad()
    def _next(self, ids, temperature, cache):
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        logits = output.logits[0, -1].double() * self.sharpness / (temperature or 1.0)
        logp = logits.log_softmax(-1)
        greedy = logp.argmax().view(1)
        token = torch.multinomial(logp.exp(), 1, generator=self.generator) if temperature else greedy
        return token.item(), logp[token].item(), output.past_key_values


class Replica(RolloutReplica):
    async def launch_servers(self):
        server = (
            ray.remote(Sampler)
            .options(num_cpus=0, name=actor_name(self.replica_rank), max_concurrency=64)
            .remote(self.model_config.path, self.config.response_length, self.replica_rank)
        )
        self.servers, self._server_handle = [server], server
        self._server_address = f"{await server.node_address.remote()}:{9000 + self.replica_rank}"


class WeightSender(BaseRollout):
    """Lives in the training worker and sends its weights to the sampler through Ray's object store."""

    def __init__(self, config, model_config, device_mesh, replica_rank=-1):
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.sleep_level = 1

    @property
    def sampler(self):
        return ray.get_actor(actor_name(self.rank))

    async def resume(self, tags):
        await self.sampler.wake_up.remote(tags)

    async def release(self):
        await self.sampler.sleep.remote()

    async def update_weights(self, weights, global_steps=None, **unused):
        await self.sampler.update_weights.remote(await _collected(weights), global_steps)
