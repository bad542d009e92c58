"""The command line of ``openrlhf.cli.train_ppo_ray``, parsed by the program itself."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

MODULE = "openrlhf.cli.train_ppo_ray"
DEFAULTS = {
    "--data.input_key": "input",
    "--data.label_key": "label",
    "--ref.num_gpus_per_node": 1,
    "--actor.num_gpus_per_node": 1,
    "--vllm.num_engines": 0,
    "--vllm.sync_backend": "gloo",
    "--ds.attn_implementation": "eager",
    "--ds.zero_stage": 2,
    "--rollout.batch_size": 4,
    "--rollout.n_samples_per_prompt": 2,
    "--rollout.micro_batch_size": 2,
    "--train.batch_size": 4,
    "--train.micro_batch_size": 2,
    "--train.max_epochs": 2,
    "--algo.advantage.estimator": "reinforce_baseline",
    "--algo.kl.init_coef": 0.5,
    "--actor.adam.lr": 5e-5,
    "--actor.lr_warmup_ratio": 0,
    "--actor.max_norm": 0,
}
ONE_STEP = ("--train.batch_size", "8", "--train.max_epochs", "1")
"""One optimizer step on all rollouts: ``Result.gradient`` is then known."""

PACKED = ("--ds.packing_samples", "--vllm.num_engines", "1")
DYNAMIC = ("--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "24", "--vllm.num_engines", "1")
"""Packed sequences, and micro-batches by number of tokens; both need a rollout engine in the arguments."""

SPEC = "--algo.kl.estimator"
LOSS = ("--algo.kl.use_loss", SPEC, "k2@loss/is:token")
SAMPLER = ("--algo.kl.use_loss", SPEC, "k2@loss/is:token/behaviour:sampler")
REWARD = (SPEC, "k1@reward")
ADVANTAGE = (SPEC, "k1@advantage", "--algo.advantage.estimator", "group_norm")
CORRECTED = ("--algo.advantage.is_correction_level", "token")
"""Flags of each placement of a spec, of sampler corrections, and of OpenRLHF's own sampler correction."""


class _ParsedError(Exception):
    pass


def parse(assets: Path, flags: Sequence[str], *, attached: bool = True) -> Any:
    """The host's own parsed and checked arguments: its program, up to the first thing that it does with them.

    Args:
        assets: the models and data to name in them.
        flags: over the defaults above.
        attached: let the parser take specs, as ``kl-plugins run`` does around the program.

    Raises:
        SystemExit: the parser refuses them; or whatever else the program raises before.
    """

    def stop(args: Any) -> None:
        raise _ParsedError(args)

    paths = {
        "--actor.model_name_or_path": assets / "model",
        "--reward.remote_url": assets / "reward.py",
        "--data.prompt_dataset": assets / "prompts.jsonl",
        "--ckpt.path": assets / "checkpoints",
        "--ckpt.output_dir": assets / "saved",
    }
    defaults = [str(word) for pair in {**paths, **DEFAULTS}.items() for word in pair]
    with ExitStack() as stack:
        stack.enter_context(mock.patch("openrlhf.utils.get_strategy", stop))
        stack.enter_context(mock.patch("ray.is_initialized", return_value=True))
        stack.enter_context(mock.patch.object(sys, "argv", [MODULE, *defaults, *map(str, flags)]))
        if attached:
            from kl_plugins.adapters.openrlhf.launch import extended_flag

            stack.enter_context(extended_flag())
        try:
            runpy.run_module(MODULE, run_name="__main__")
        except _ParsedError as parsed:
            return parsed.args[0]
    raise RuntimeError(f"{MODULE} never asked for its strategy")
