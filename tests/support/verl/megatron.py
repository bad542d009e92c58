"""veRL's Megatron engine on a CPU: ``megatron RANK SIZE RENDEZVOUS OUTPUT TENSOR PIPELINE``, one process of a group.

The engine's own ``train_batch``, Megatron's schedules, and a real ``GPTModel`` run. Four things are stand-ins: tensors
that Megatron would allocate on a GPU are on the CPU, its random states are torch's, the model is built here and not by
Megatron-Bridge, and the optimizer is plain SGD.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))

import torch
import torch.distributed as dist
import verl_on_cpu  # noqa: F401  registers the platform
from torch.overrides import TorchFunctionMode

from kl_plugins.adapters import verl as adapter
from kl_plugins.adapters.verl.session import session_of
from tests.core.exact.processes import finish
from tests.support.verl.workers import Batch

VOCABULARY, PROMPTS, RESPONSES = 64, (3, 5), (6, 4)
SCENARIOS = {
    "native": ("mse", False),
    "spec": ("k2@loss", False),
    "weighted": ("k2@loss/is:token/beta:dual-0.1-0.1", False),
    "not finite": ("k2@loss", True),
}
"""Text of ``kl_loss_type``, and whether a log-prob of the reference is NaN."""


class OnCPU(TorchFunctionMode):
    """Allocates on the CPU what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Descent:
    """Plain SGD behind the interface of Megatron's optimizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> tuple[bool, float, int]:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        return True, 1.0, 0


def parallel_model(tensor: int, pipeline: int) -> tuple[torch.nn.Module, Any]:
    """This rank's part of a small model, the same for every split, and its config."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        variable_seq_lengths=pipeline > 1,
        moe_token_dispatcher_type="alltoall",
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model.zero_grad_buffer = model.zero_grad  # of Megatron's wrapper for data parallelism
    return model, config


def training_worker(tensor: int, pipeline: int, text: str) -> Any:
    """veRL's training worker with its Megatron engine, without what needs Megatron-Bridge and Ray."""
    from transformers import Qwen2Config
    from verl.workers import engine_workers
    from verl.workers.config import ActorConfig, McoreEngineConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    engine = object.__new__(MegatronEngineWithLMHead)
    model, engine.tf_config = parallel_model(tensor, pipeline)
    engine.module, engine.optimizer, engine.enable_routing_replay, engine.mode = [model], Descent(model), False, None
    engine._is_offload_param = engine._is_offload_grad = engine._is_offload_optimizer = False
    engine.engine_config = McoreEngineConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=1,
    )
    engine.model_config = SimpleNamespace(
        hf_config=Qwen2Config(vocab_size=VOCABULARY, architectures=["Qwen2ForCausalLM"]),
        mtp=SimpleNamespace(enable=False, enable_train=False),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    worker = object.__new__(engine_workers.TrainingWorker)
    worker.engine, worker.engine_config, worker.device_name = engine, engine.engine_config, "cpu"
    worker.model_config, worker.flops_counter, worker.profiler = {"use_remove_padding": False}, None, None
    actor = ActorConfig(
        strategy="megatron",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        use_kl_loss=True,
        kl_loss_type=text,
        kl_loss_coef=0.1,
    )
    worker.loss_fn = partial(engine_workers.ppo_loss, config=actor)
    return worker


def batch(broken: bool) -> Any:
    """The same two sequences on every rank."""
    random = torch.Generator().manual_seed(1)

    def ids(lengths: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randint(1, VOCABULARY, (length,), generator=random) for length in lengths]

    def about(level: float) -> list[torch.Tensor]:
        return [level + torch.rand(length, generator=random) for length in RESPONSES]

    log_probs = {"old_log_probs": about(-4.5), "ref_log_prob": about(-5.5)}
    if broken:
        log_probs["ref_log_prob"][1][2] = torch.nan
    masks = [torch.ones(length) for length in RESPONSES]
    return Batch(ids(PROMPTS), ids(RESPONSES), log_probs, masks, about(-0.5)).tensordict()


def outcome(tensor: int, pipeline: int, text: str, broken: bool) -> dict[str, Any]:
    """What one step did on this rank: parameters afterwards, metrics, beta, or the error."""
    worker = training_worker(tensor, pipeline, text)
    session = session_of(worker)
    if session is not None:
        session.confirmed = True
    found: dict[str, Any] = {}
    try:
        output = type(worker).train_batch(worker, batch(broken))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if output is not None:
        found["metrics"] = sorted(output["metrics"])
    if session is not None:
        found["beta"], found["counted"] = session.controller.due(0.1), session.counted
    found["parameters"] = {name: value.detach().clone() for name, value in worker.engine.module[0].named_parameters()}
    return found


def main() -> None:
    """Run all scenarios."""
    rank, size, rendezvous, output, tensor, pipeline = (int(a) if a.isdigit() else a for a in sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    adapter.attach()
    with OnCPU():
        results = {name: outcome(tensor, pipeline, *given) for name, given in SCENARIOS.items()}
    finish(results, output)


if __name__ == "__main__":
    main()
