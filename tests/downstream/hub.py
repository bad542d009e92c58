"""Builds stand-ins for the tiny models and datasets that TRL's tests load from the hub, without any download.

They are written into a folder, under the names that the tests use. A test that runs in that folder therefore loads them
as local paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ORGANISATION = "trl-internal-testing"
VOCABULARY = 151648
"""Vocabulary size of the stand-ins. Some tests contain the ids of Qwen's special tokens, which are the last ones."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "hidden_size": 8, "intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 4, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip
PROMPTS = [f"The {i}th {noun} is" for i, noun in enumerate(["river", "hill", "stone", "lamp", "song"] * 4)][:19]


def named_in(files: Iterable[Path]) -> set[str]:
    """Return the names of the organisation's models and datasets that occur in the files."""
    pattern = re.compile(rf"{ORGANISATION}/([\w.-]+)")
    return {name for file in files for name in pattern.findall(file.read_text())}


def build(names: Iterable[str], folder: Path, vocabulary: int = VOCABULARY) -> list[str]:
    """Write a stand-in for each name for which this is possible, and return the other names."""
    unknown = []
    for name in sorted(names):
        target = folder / ORGANISATION / name
        if target.exists():
            continue
        if name == "zen":
            _dataset(target)
        elif not _model(name, target, vocabulary):
            unknown.append(name)
    return unknown


def _special(vocabulary: int) -> dict[str, int]:
    return {token: vocabulary - 5 + i for i, token in enumerate(SPECIAL)}


def _model(name: str, target: Path, vocabulary: int) -> bool:
    import torch
    import transformers

    named = re.match(r"tiny-(\w+For(?:CausalLM|SequenceClassification))", name)
    kind = getattr(transformers, named[1], None) if named else None
    if kind is None:
        return False
    numbers = _special(vocabulary)
    config = kind.config_class(
        vocab_size=vocabulary, pad_token_id=numbers["<|endoftext|>"], eos_token_id=numbers["<|im_end|>"], **SIZES
    )
    config.num_labels = 1
    torch.manual_seed(0)
    kind(config).save_pretrained(target)
    _tokenizer(numbers).save_pretrained(target)
    return True


def _tokenizer(special: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
        # By default transformers 4 adds token_type_ids, which no model accepts.
        model_input_names=["input_ids", "attention_mask"],
    )


def _dataset(target: Path) -> None:
    rows = {
        "standard_prompt_only": [{"prompt": text} for text in PROMPTS],
        "conversational_prompt_only": [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS],
    }
    configs = []
    for config, examples in rows.items():
        (target / config).mkdir(parents=True)
        files = []
        for split, part in (("train", examples[:17]), ("test", examples[17:])):
            (target / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        configs.append({"config_name": config, "data_files": files})
    # The header of a README is YAML, and JSON is valid YAML.
    (target / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
