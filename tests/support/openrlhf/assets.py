"""A tokenizer, two two-layer Qwen2 models, a toy task and its reward, made on the spot: nothing comes from a hub."""

import json
from pathlib import Path

import torch

PAD, EOS = "<|pad|>", "<|end|>"
VOCABULARY = 320  # vLLM on the CPU wants a multiple of 64
REWARD = '''
"""Share of digits in the answer."""

import torch


def reward_func(queries, prompts, labels):
    answers = [query[len(prompt) :] for query, prompt in zip(queries, prompts)]
    shares = torch.tensor([sum(c.isdigit() for c in text) / max(len(text), 1) for text in answers])
    return {"rewards": shares, "scores": shares, "extra_logs": {"digits": shares}}
'''


def build(folder: Path, **settings) -> Path:
    """Write ``model``, ``reference``, ``prompts.jsonl`` and ``reward.py`` into `folder`.

    ``reference`` has the same tokenizer and other weights, for tests that need a KL from the first step on.

    Args:
        folder: is created.
        settings: of the config of both models.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte by byte, in the form of Qwen's own tokenizer: loading it by its model's type changes nothing.
    words = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<|{index}|>" for index in range(len(words), VOCABULARY)]  # whatever is sampled can be decoded
    inner = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=EOS)
    for name, noise in (("model", 0.0), ("reference", 0.007)):
        model = _model(**settings)
        with torch.no_grad():
            random = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "reward.py").write_text(REWARD)
    pairs = [(7 * index % 30, 11 * index % 30) for index in range(64)]
    lines = [json.dumps({"input": f"{a}+{b}=", "label": str(a + b)}) for a, b in pairs]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def model_config(**settings):
    """Config of a tiny model for the tokenizer's vocabulary."""
    from transformers import Qwen2Config

    # A head size of 32 is the smallest that vLLM's attention on the CPU takes.
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return Qwen2Config(**{**defaults, **settings})


def _model(**settings):
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(model_config(**settings))
        with torch.no_grad():  # far from uniform, so that log-ratios are not tiny
            model.lm_head.weight.mul_(20)
    return model.to(torch.bfloat16)
