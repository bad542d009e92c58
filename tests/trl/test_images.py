"""Vision-language models: images go through TRL's own path, and every term sees them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version

from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from tests.support.trl import images, trainers
from tests.support.trl.states import TEMPERATURE, by_hand
from tests.support.trl.trainers import BETA

pytestmark = pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="run with TRL 1.16 alone")

EVERY = 16
"""Tokens of the vocabulary: ``top:`` is exact with all of them."""


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return images.llava(tmp_path_factory.mktemp("llava"))


def build(vlm: str, folder: Path, spec: str, **changes: Any) -> Any:
    settings = {"temperature": TEMPERATURE, "loss_type": "dapo", "scale_rewards": "none", "num_iterations": 2}
    args = GRPOConfig(**trainers.settings(folder, kl=spec, **{**settings, **changes}))
    built = GRPOTrainer(vlm, trainers.zero_reward, args=args, train_dataset=images.prompts())
    trainers.shift(built)
    return built


@pytest.mark.parametrize("spec", ["k2@loss", "exact@loss", f"exact@loss/top:{EVERY}"])
def test_gradient_of_a_loss(spec, vlm, tmp_path):
    built = build(vlm, tmp_path, spec)
    inputs, ours, _ = trainers.rollout_and_gradient(built)
    mask = inputs["completion_mask"].bool()
    kl, logp, *_ = by_hand(built, inputs)
    exact = None if spec == "k2@loss" else kl
    term = kl_term(KLSpec.parse(spec.split("/")[0]), logp, inputs["ref_per_token_logps"], mask, exact=exact)
    built.model.zero_grad()
    (BETA * term.loss.sum() / mask.sum()).backward()
    expected = trainers.gradient(built)
    assert (ours - expected).norm() / expected.norm() < 1e-4
    assert any(
        "vision" in name and p.grad is not None and p.grad.norm() > 0 for name, p in built.model.named_parameters()
    )
    blind = by_hand(built, {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
    assert (blind.kl - kl).abs().max() > 1e-3


@pytest.mark.parametrize("spec", ["k1@advantage", "exact@advantage"])
def test_penalty_of_an_advantage(spec, vlm, tmp_path):
    built = build(vlm, tmp_path, spec)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    with torch.no_grad():
        kl, logp, *_ = by_hand(built, inputs)
    mask = inputs["completion_mask"].bool()
    exact = kl.float() if "exact" in spec else None
    expected = kl_penalty(KLSpec.parse(spec), logp.float(), inputs["ref_per_token_logps"], mask, exact=exact)
    torch.testing.assert_close(inputs["kl_plugins_penalty"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", ["k1@reward", "exact@loss/top:4"])
def test_images_are_split_with_their_rows(spec, vlm, tmp_path):
    built = build(vlm, tmp_path, spec, per_device_train_batch_size=4, steps_per_generation=2, max_steps=4)
    built.train()
    assert trainers.log_of(built, "kl/active") == [1.0] * 4
