"""A tokenizer, a two-layer Qwen2, a toy task and its reward, made on the spot: nothing comes from a hub."""

from pathlib import Path

import torch

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
# veRL's turn handling expects Qwen's template, whose newlines are tokens.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD = '''
"""Share of digits in the answer."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **unused):
    text = (solution_str or "").replace(" ", "")
    return sum(character.isdigit() for character in text) / max(len(text), 1)
'''


def build(folder: Path) -> Path:
    """Write ``model``, ``train.parquet``, ``val.parquet`` and ``reward.py`` into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # Byte by byte, in the form of Qwen's own tokenizer: loading it by its model's type changes nothing.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    # A head size of 32 is the smallest that vLLM's attention on the CPU takes.
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():  # far from uniform, so that log-ratios are not tiny
            model.lm_head.weight.mul_(20)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    for name, count in (("train", 64), ("val", 4)):
        _prompts(count).to_parquet(folder / f"{name}.parquet")
    return folder


def _prompts(count: int):
    import pandas

    pairs = [(7 * index % 30, 11 * index % 30) for index in range(count)]
    return pandas.DataFrame(
        {
            "data_source": "toy/sum",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "ability": "sum",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"index": index},
        }
        for index, (a, b) in enumerate(pairs)
    )
