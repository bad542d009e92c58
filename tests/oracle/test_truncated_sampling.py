"""What truncated sampling does to a weighted gradient, by exact expectation in one state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec, kl_term
from kl_plugins.sampling import EFFECT_SIZES, EFFECTS, PRODUCTS, Sampling, read_text

TOKENS, STD, DISTANCE, DRAWS = 200, 3.0, 0.5, 20


def kept(policy: Tensor, setting: str) -> Tensor:
    """(V,) bool: the tokens that an engine may sample."""
    name, _, number = setting.partition(" ")
    value, (ordered, index) = float(number), policy.sort(descending=True)
    if name == "top_p":
        chosen = ordered.cumsum(0) - ordered < value
    elif name == "top_k":
        chosen = torch.arange(TOKENS) < value
    else:
        chosen = ordered >= value * ordered[0]
    return torch.zeros(TOKENS, dtype=torch.bool).scatter(0, index, chosen)


def expected_gradient(spec: str, logits: Tensor, ref: Tensor, sampler: Tensor) -> Tensor:
    """E_sampler[gradient] by a sum over all tokens that the sampler can draw; (V,)."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(0)[:, None]
    mask = (sampler > 0)[:, None]
    behaviour = sampler.clamp_min(1e-300).log()[:, None]
    term = kl_term(KLSpec.parse(spec), logp, ref.log_softmax(0)[:, None], mask, sampler_logp=behaviour)
    (gradient,) = torch.autograd.grad((sampler[:, None] * term.loss).sum(), logits)
    return gradient


@pytest.mark.parametrize("setting", EFFECT_SIZES)
def test_the_size_of_the_effect_is_the_one_that_is_stated(setting: str) -> None:
    errors = []
    for seed in range(DRAWS):
        random = torch.Generator().manual_seed(seed)
        ref = STD * torch.randn(TOKENS, generator=random, dtype=torch.float64)
        logits = ref + DISTANCE * torch.randn(TOKENS, generator=random, dtype=torch.float64)
        policy = logits.softmax(0)
        sampler = policy * kept(policy, setting)
        sampler = sampler / sampler.sum()
        right = expected_gradient("k2@loss", logits, ref, policy)
        found = expected_gradient("k2@loss/is:token", logits, ref, sampler)
        errors.append(float((found - right).norm() / right.norm()))
        whole = expected_gradient("k2@loss/is:token", logits, ref, policy)
        assert float((whole - right).norm() / right.norm()) < 1e-12
    assert sum(errors) / DRAWS == pytest.approx(EFFECT_SIZES[setting], abs=0.01)
    assert setting in EFFECTS


@pytest.mark.parametrize("level", PRODUCTS)
def test_products_of_weights_decay_with_the_kept_mass(level: str) -> None:
    """Each weight is the kept mass S < 1, so the last token's is S ** T, or the whole response's is."""
    length, mass = 1000, 0.99
    logp = torch.full((1, length), -2.0)
    text = f"k2@loss/is:{level}" + ("/horizon:sequence" if level == "decision" else "")
    term = kl_term(
        KLSpec.parse(text), logp, logp - 0.1, torch.ones(1, length), sampler_logp=logp - torch.tensor(mass).log()
    )
    assert float(term.weight[0, -1]) == pytest.approx(mass**length, rel=1e-3)
    assert mass**length < 5e-5


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("top_p: 0.9\ntop_k: 20\n", Sampling(top_p=0.9, top_k=20)),
        (
            "main_ppo actor_rollout_ref.rollout.top_p=0.9 actor_rollout_ref.rollout.val_kwargs.top_k=5 "
            "actor_rollout_ref.rollout.temperature=0.7 actor_rollout_ref.rollout.logprobs_mode=raw_logprobs",
            Sampling(temperature=0.7, top_p=0.9, raw=True),
        ),
        ("--rollout.top_p 0.95 --rollout.temperature=0.8", Sampling(temperature=0.8, top_p=0.95)),
        ("generation_kwargs: {'repetition_penalty': 1.1, \"min_p\": 0.05}", Sampling(min_p=0.05, penalised=True)),
        ("rollout.top_k=-1 repetition_penalty=1.0 top_p: null stop_p: 0.5", Sampling(top_k=-1)),
        ("", Sampling()),
    ],
)
def test_settings_are_found_by_name_in_any_config(text: str, wanted: Sampling) -> None:
    assert read_text(text) == wanted


def test_what_is_refused_and_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, raw = Sampling(top_p=0.9), Sampling(temperature=0.7, raw=True, logprobs_setting="rollout.logprobs_mode")

    def problems(sampling: Sampling, text: str, source: str) -> list[str]:
        return list(sampling.problems(KLSpec.parse(text), source))

    assert problems(cut, "k2@loss/is:token", "sampler") == []
    assert problems(cut, "k2@loss/is:prefix", "old") == []
    assert problems(cut, "k2@loss", "unused") == []
    (refusal,) = problems(cut, "k2@loss/is:prefix", "sampler")
    assert "is:prefix" in refusal
    assert "top_p 0.9" in refusal
    (refusal,) = problems(raw, "k2@loss/is:token", "sampler")
    assert "rollout.logprobs_mode" in refusal
    assert problems(Sampling(raw=True), "k2@loss/is:token", "sampler") == []
    assert problems(Sampling(penalised=True, raw=True), "k2@loss/is:token", "sampler")
    monkeypatch.setenv("KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS", "1")
    assert problems(cut, "k2@loss/is:prefix", "sampler") == []
    assert "kept probability mass" in cut.caveats(KLSpec.parse("k2@loss/is:token"), "sampler")[0]
    assert "never sampled" in cut.caveats(KLSpec.parse("k2@loss/is:token"), "old")[0]
    assert Sampling().caveats(KLSpec.parse("k2@loss/is:token"), "sampler") == ()
