"""Vision-language models: OpenRLHF passes images to policy and reference, and every term sees them."""

import pytest
import torch

from tests.support.openrlhf import images
from tests.support.openrlhf.command_line import ONE_STEP, SPEC

USE = ("--algo.kl.use_loss", SPEC)
IMAGES = ("--data.max_images_per_prompt", "1")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    return images.build(tmp_path_factory.mktemp("llava")), images.make_rollouts()


@pytest.fixture
def seeing(harness, pictured, monkeypatch):
    """The harness on vision-language models."""
    monkeypatch.setattr(harness, "assets", pictured[0])
    return harness


def mean(rollouts, values):
    """Mean over the response tokens of all sequences."""
    masks = [mask.bool() for mask in rollouts.masks]
    return float(torch.cat([row[mask] for row, mask in zip(values, masks, strict=True)]).mean())


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ((*USE, "k2@loss"), "k1"),
        ((SPEC, "k1@reward"), "k1"),
        ((*USE, "exact@loss"), "exact"),
        ((*USE, "exact@loss/top:320"), "exact"),
    ],
)
def test_policy_and_reference_see_the_images(seeing, pictured, flags, key):
    folder, rollouts = pictured
    (metrics,) = seeing.run((*flags, *IMAGES, *ONE_STEP), rollouts).metrics
    policy, reference = (rollouts.softmax(folder / name) for name in ("model", "reference"))
    exact = mean(rollouts, [(p.exp() * (p - q)).sum(-1) for p, q in zip(policy, reference, strict=True)])
    blind = rollouts.softmax(folder / "model", blind=True)
    unseen = mean(rollouts, [(p.exp() * (p - q)).sum(-1) for p, q in zip(blind, reference, strict=True)])
    assert abs(unseen - exact) > 0.1 * exact
    if key == "exact":
        assert metrics["kl/exact"] == pytest.approx(exact, rel=0.03)
        return
    sides = (rollouts.log_probs_of(folder / name) for name in ("model", "reference"))
    k1 = mean(rollouts, [p - q for p, q in zip(*sides, strict=True)])
    assert metrics["kl/reverse_k1"] == pytest.approx(k1, rel=0.03, abs=0.02)
