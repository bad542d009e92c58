"""A tiny LLaVA for OpenRLHF, and fixed rollouts whose prompts begin with an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.openrlhf import assets
from tests.support.openrlhf.rollouts import PROMPTS, RESPONSES, Rollouts

SIDE = 16
"""Width and height of the square images, in pixels."""

IMAGE = 300
"""Token that stands for a part of an image."""

PARTS = 5
"""Tokens of one image: four patches and the class token."""


def build(folder: Path) -> Path:
    """Write what ``assets.build`` writes, with two LLaVAs and their processor in the place of the models."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    assets.build(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    chosen = {"patch_size": SIDE // 2, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, image_token=tokenizer.convert_ids_to_tokens(IMAGE), **chosen
    )
    sizes = {"num_hidden_layers": 1, "image_size": SIDE, "patch_size": SIDE // 2, "projection_dim": 16}
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, **sizes)
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = LlavaConfig(
        vision_config=vision,
        text_config=assets.model_config(),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        **features,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, noise in (("model", 0.0), ("reference", 0.007)):
            if noise == 0.0:
                model = LlavaForConditionalGeneration(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(noise * torch.randn_like(parameter))
                if noise == 0.0:  # far from uniform, and images matter
                    model.lm_head.weight.mul_(20)
                    for parameter in model.model.multi_modal_projector.parameters():
                        parameter.mul_(20)
            model.to(torch.bfloat16).save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
    return folder


@dataclass(frozen=True)
class Pictured(Rollouts):
    """Rollouts with one image each.

    Attributes:
        pixels: (1, 3, SIDE, SIDE) of each sequence.
    """

    pixels: tuple[Tensor, ...] = ()

    def experiences(self) -> list[Any]:
        """See :meth:`Rollouts.experiences`; the image is where OpenRLHF's generator puts what the processor gave."""
        found = super().experiences()
        for experience, pixels in zip(found, self.pixels, strict=True):
            experience.mm_train_inputs = [{"pixel_values": pixels.clone()}]
        return found

    def log_probs_of(self, path: Path, blind: bool = False) -> list[Tensor]:
        """Log-probs of each sequence's tokens after the first, by the model alone.

        Args:
            path: of the model.
            blind: show it black images.
        """
        return [
            rows.gather(-1, ids[1:, None])[:, 0]
            for rows, ids in zip(self.softmax(path, blind), self.tokens, strict=True)
        ]

    def softmax(self, path: Path, blind: bool = False) -> list[Tensor]:
        """Log-probs of all tokens in each state of each sequence: (length - 1, vocabulary) each, float32."""
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        found = []
        for ids, pixels in zip(self.tokens, self.pixels, strict=True):
            with torch.no_grad():
                logits = model(ids[None], pixel_values=pixels * (not blind)).logits
            found.append(logits[0, :-1].log_softmax(-1))
        return found


def make_rollouts() -> Pictured:
    """Fixed rollouts, each with an image before its prompt."""
    random = torch.Generator().manual_seed(7)
    tokens, masks, pixels = [], [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        text = torch.randint(2, IMAGE, (prompt + response,), generator=random)
        ids = torch.cat([torch.full((PARTS,), IMAGE), text])
        tokens.append(ids)
        masks.append((torch.arange(1, len(ids)) >= PARTS + prompt).long())
        pixels.append(torch.randn(1, 3, SIDE, SIDE, generator=random))
    rewards = torch.rand(len(PROMPTS), generator=random).tolist()
    return Pictured(tokens, masks, rewards, None, tuple(pixels))
