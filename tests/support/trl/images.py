"""Tiny vision-language models with their processors, made on the spot, and prompts with images."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer

from tests.support.trl import trainers

SIDE = 16
"""Width and height of the square images, in pixels."""

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def prompts(rows: int = 16) -> Dataset:
    """Sums to complete, with an image of one colour each."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i % 7}+{i % 5}="}],
                "image": Image.new("RGB", (SIDE, SIDE), (40 * (i % 6), 100, 255 - 30 * (i % 8))),
            }
            for i in range(rows)
        ]
    )


def llava(folder: Path) -> str:
    """A LLaVA: a CLIP encoder of one layer before the usual Qwen2. Write it with its processor; return the folder."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
    )

    tokenizer = AutoTokenizer.from_pretrained(trainers.build_model(folder / "text"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    sizes = {"patch_size": SIDE // 2, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE, **sizes)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    sizes = {"num_hidden_layers": 1, "image_size": SIDE, "patch_size": SIDE // 2, "projection_dim": 16}
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, **sizes)
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_attention_heads=4, **sizes, **special
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            **special,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4.0)  # sharper than the initialisation
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20.0)  # so that images matter
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
