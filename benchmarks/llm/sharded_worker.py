"""One process of `benchmarks.llm.sharded`: an optimizer step of TRL per arm, from which the gradient is computed.

The step is that of plain SGD with a large learning rate, so that the gradient is the difference of the weights divided
by this rate. That works alike for whole weights, for FSDP2 and for DeepSpeed, and it includes everything that the
trainer does to a gradient. All rewards are zero, so that the gradient is that of the KL term alone. Responses are
fixed random tokens, and the policy is a copy of the reference with noise on its weights.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.drivers.trl import QUIET, Responses
from benchmarks.reporting import write_json
from kl_plugins.adapters.trl.processes import end_process_group

from . import model
from .settings import HOST
from .train import classes

SINGLE, FSDP2, ZERO2, ZERO3 = "single", "fsdp2", "zero2", "zero3"
STAGES = {ZERO2: 2, ZERO3: 3}  # of DeepSpeed's ZeRO
LEARNING_RATE = 1e3  # so large that rounding of the weights after the step does not matter
NOISE = 0.03  # of the weights of the policy, as a share of their standard deviation


@dataclass(frozen=True)
class Plan:
    """What all processes of a comparison have in common.

    Attributes:
        model: folder of the reference.
        device: `cpu` or `cuda`.
        prompts, generations: number of prompts, and of responses to each.
        tokens: largest number of tokens of a response.
        beta: coefficient of the KL term.
    """

    model: str
    device: str = "cpu"
    prompts: int = 2
    generations: int = 4
    tokens: int = 64
    beta: float = 0.1

    def write(self, folder: Path) -> None:
        """Store the plan in a folder, where the workers find it."""
        write_json(folder / "plan.json", asdict(self))

    @staticmethod
    def read(folder: Path) -> Plan:
        """Return the plan that a folder has."""
        return Plan(**json.loads((folder / "plan.json").read_text()))


def gradient_of(plan: Plan, way: str, arm: str) -> dict[str, Tensor]:
    """Make one step and return the gradient of every parameter on the CPU, float32; in process 0 only, else empty.

    Args:
        plan: the plan.
        way: `single`, `fsdp2`, `zero2` or `zero3`; its environment variables are set already.
        arm: `trl` or a KL spec.
    """
    from transformers import PrinterCallback

    from kl_plugins.adapters.trl import detach

    if way in STAGES:
        # As long as the config of an earlier arm is known, transformers loads models in pieces.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    trainer_class, config_class = classes(arm)
    policy = _noisy(model.load(Path(plan.model), plan.device))
    before = {name: parameter.detach().cpu().clone() for name, parameter in policy.named_parameters()}
    tokenizer = model.tokenizer_of(Path(plan.model))
    responses = _responses(plan, policy.config.get_text_config().vocab_size)
    try:
        with tempfile.TemporaryDirectory() as output:
            config = config_class(**_arguments(plan, way, arm, output))
            if way != SINGLE and plan.device == "cpu":
                _call_the_processes_gpus(way)
            trainer = trainer_class(
                policy,
                reward_funcs=_no_reward,
                args=config,
                train_dataset=responses.dataset(),
                processing_class=tokenizer,
                rollout_func=responses,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            _require(trainer, way)
            after = {name: _whole(p) for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    finally:
        detach()
    if int(os.environ.get("RANK", "0")):
        return {}
    if before.keys() != after.keys():
        raise RuntimeError(f"the parameters have other names under {way}: {sorted(before.keys() ^ after.keys())[:4]}")
    return {name: (before[name] - after[name]) / LEARNING_RATE for name in before}


def _noisy(policy: Any) -> Any:
    generator = torch.Generator(policy.device).manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.add_(NOISE * parameter.std() * noise)
    return policy


def _responses(plan: Plan, vocabulary: int) -> Responses:
    generator = torch.Generator().manual_seed(2)

    def draw(length: int) -> Tensor:
        return torch.randint(4, vocabulary, (length,), generator=generator)

    asked = [draw(8) for _ in range(plan.prompts)]
    prompts = [prompt for prompt in asked for _ in range(plan.generations)]
    return Responses(prompts, [draw(plan.tokens - index % 3) for index in range(len(prompts))], None, plan.generations)


def _no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _arguments(plan: Plan, way: str, arm: str, output: str) -> dict[str, Any]:
    batch = plan.prompts * plan.generations
    return {
        **QUIET,
        "output_dir": output,
        "max_steps": 1,
        "per_device_train_batch_size": batch // int(os.environ.get("WORLD_SIZE", "1")),
        "num_generations": plan.generations,
        "max_completion_length": plan.tokens,
        "beta": plan.beta,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        # DeepSpeed finds the CPU by a variable of its own; Accelerate would ignore DeepSpeed together with use_cpu.
        "use_cpu": plan.device == "cpu" and way not in STAGES,
        **({} if arm == HOST else {"kl": arm}),
        **({"deepspeed": {**DEEPSPEED, "zero_optimization": {"stage": STAGES[way]}}} if way in STAGES else {}),
    }


DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


def _call_the_processes_gpus(way: str) -> None:
    """Make Accelerate shard on a CPU, which it does only for processes on accelerators.

    Under DeepSpeed it does not count processes on a CPU either.
    """
    from accelerate.state import DistributedType, PartialState

    state = PartialState()
    state.distributed_type = DistributedType.MULTI_GPU
    if way in STAGES:
        state.backend, state.num_processes = "gloo", int(os.environ.get("WORLD_SIZE", "1"))
        state.process_index = state.local_process_index = int(os.environ.get("RANK", "0"))


@contextmanager
def without_compilation() -> Iterator[None]:
    """Within the block, DeepSpeed on a CPU compiles no operator for shared memory; its processes use gloo."""
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute of its package, the name is PyTorch's
    build, backend.build_shm_op = backend.build_shm_op, lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build


def _require(trainer: Any, way: str) -> None:
    """Check that the trainer really sharded policy and reference; ZeRO-2 shards the policy's gradients alone.

    Raises:
        RuntimeError: It did not.
    """
    if way == ZERO2:
        stage = trainer.model_wrapped.zero_optimization_stage()
        if stage != STAGES[way]:
            raise RuntimeError(f"the model was trained with ZeRO-{stage}, although {way} was asked for")
        return
    for name in ("model", "ref_model"):
        parameter = next(iter(trainer.accelerator.unwrap_model(getattr(trainer, name)).parameters()))
        found = FSDP2 if hasattr(parameter, "full_tensor") else ZERO3 if hasattr(parameter, "ds_id") else SINGLE
        if found != way:
            raise RuntimeError(f"{name} was trained as {found}, although {way} was asked for")


def _whole(parameter: Tensor) -> Tensor:
    gather = getattr(parameter, "full_tensor", None)
    if gather is not None:
        whole: Tensor = gather()
    elif hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            whole = parameter.data.clone()
    else:
        whole = parameter
    return whole.detach().float().cpu()


def attempt(plan: Plan, folder: Path, way: str, arm: str) -> dict[str, Any]:
    """Store the gradient of an arm in `folder`; an error is returned, so that it does not stop the other arms."""
    start = time.monotonic()
    try:
        gradient = gradient_of(plan, way, arm)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0]}"}
    finally:
        gc.collect()  # trainers and models form cycles
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    if gradient:
        torch.save(gradient, gradient_file(folder, way, arm))
    return {"seconds": round(time.monotonic() - start, 2)}


def gradient_file(folder: Path, way: str, arm: str) -> Path:
    """Return the path of the gradient of an arm."""
    return folder / f"{way}-{arm.replace('/', '-')}.pt"


def main(folder: Path, way: str, arms: list[str]) -> None:
    """Compute the gradients of all arms and store them in `folder`; process 0 writes `<way>.json` after each arm."""
    plan = Plan.read(folder)
    rank = int(os.environ.get("RANK", "0"))
    if plan.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    made: dict[str, Any] = {}
    with without_compilation() if way in STAGES and plan.device == "cpu" else nullcontext():
        for arm in arms:
            made[arm] = attempt(plan, folder, way, arm)
            if rank == 0:
                write_json(folder / f"{way}.json", made)
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","))
