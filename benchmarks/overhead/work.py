"""Shared code of all hosts' workers: the model, the tokens, and the loop over pairs and arms."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.overhead.measure import Block, in_turns
from benchmarks.overhead.plan import SPEC, Pair, Plan, Size
from benchmarks.reporting import machine

BETA = 0.1
GROUP = 2
"""Number of responses per prompt."""


class Tokens(NamedTuple):
    """Tokens with one entry per sequence."""

    prompts: list[Tensor]
    responses: list[Tensor]
    rewards: list[float]


def tokens(size: Size, seed: int) -> Tokens:
    """Return random token ids, without the first ids, which are special tokens."""
    random = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(4, size.vocabulary, (length,), generator=random)

    prompts: list[Tensor] = []
    for index in range(size.sequences):
        prompts.append(prompts[-1] if index % GROUP else ids(size.prompt))
    span = size.response - size.response // 2
    responses = [ids(size.response - index * span // size.sequences) for index in range(size.sequences)]
    return Tokens(prompts, responses, torch.rand(size.sequences, generator=random).tolist())


def build_model(size: Size, folder: Path) -> None:
    """Write ``model`` and ``reference``, and the files that OpenRLHF's command line expects."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from tests.support.openrlhf.assets import build

    build(folder)  # This writes the tokenizer, the prompts and the reward function.
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=2 * (size.prompt + size.response),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    for seed, name in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def measure(plan: Plan, run: Callable[[Pair, bool], Block], output: Path, version: str) -> None:
    """Measure every pair in turns, and write the blocks.

    Args:
        plan: the plan of the worker.
        run: runs one block of a pair, with its spec or with the host's own KL.
        output: path of the JSON file.
        version: version of the host.
    """
    rows: list[dict[str, Any]] = []
    for pair in plan.pairs:

        def block(arm: str, pair: Pair = pair) -> Block:
            return run(pair, arm == SPEC)

        for spec in (False, True):
            run(pair, spec)  # Not used: the first block of a process includes imports, caches and allocations.
        found = in_turns(block, plan.rounds)
        rows.append({**asdict(pair), "blocks": {arm: [vars(b) for b in blocks] for arm, blocks in found.items()}})
        print(f"done {pair.name}", flush=True)
    output.write_text(json.dumps({"version": version, "machine": machine(), "pairs": rows}))


if __name__ == "__main__":
    build_model(Size(**json.loads(sys.argv[1])), Path(sys.argv[2]))
