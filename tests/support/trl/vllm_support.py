"""What vLLM needs on a CPU: a model it can run, settings for a colocated engine, and weights it can load again."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2ForCausalLM

from tests.support.trl import trainers

COLOCATED: dict[str, Any] = {
    "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05, "vllm_max_model_length": 64,
    "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip
"""The engine in the trainer's own process; the trainer in float32, the engine in the bfloat16 that it picks."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    # Compilation takes a C++ compiler, and longer than all the tokens sampled here.
    "VLLM_USE_AOT_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block, vLLM works on this CPU and its weights can be loaded again; after it, nothing of it is left.

    vLLM prepacks linear weights on CPUs and forgets how to load them, so that TRL's weight sync fails. Here they stay
    as they are and are multiplied by torch.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers import utils

    def keep_weights(layer: torch.nn.Module, remove_weight: bool = False) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep_weights)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # TRL sets the launcher's variables for the engine; the next trainer would take itself for one of several.
    before = {name: os.environ.pop(name, None) for name in LAUNCHER}
    try:
        yield
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def build_model(folder: Path) -> str:
    """The tiny model of the other tests with heads of 32 dimensions, the fewest that vLLM's CPU attention knows."""
    trainers.build_model(folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 64, 2, 1
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4.0)
    model.save_pretrained(folder)
    return str(folder)


def score(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, T) log-probs of the completions under a model, from its logits, at the trainer's temperature."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1] / trainer.temperature
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -length:].unsqueeze(-1)).squeeze(-1)
