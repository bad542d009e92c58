"""The study's sampler in real TRL runs: it lags by its delay, and hands over its true log-probs."""

import math

import pytest
import torch

from benchmarks.demo import model
from benchmarks.study import models, trl_host
from benchmarks.study.sampler import LaggedSampler, sample
from benchmarks.study.settings import Cell, Settings
from benchmarks.tests.trl.study_support import QUICK, needs_rollouts

pytestmark = needs_rollouts


def log_probs(policy, tokenizer, prompt_ids, completion_ids):
    """Log-probs of each completion under a policy, by one pass over the whole sequence."""
    found = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1)[torch.arange(len(completion)), completion])
    return torch.cat(found)


def run_spied(arm, delay, reference, precision="fp32", **changes):
    """A real TRL run; the policy before each update, and what the sampler handed over."""
    policies, rollouts = [], []

    def spy(sampler):
        def rollout(prompts, trainer):
            policies.append(models.load(reference).eval())
            policies[-1].load_state_dict(trainer.model.state_dict())
            rollouts.append(sampler(prompts, trainer))
            return rollouts[-1]

        return rollout

    settings = Settings(**{**vars(QUICK), **changes})
    cell = Cell("sums", "llama", arm, delay, precision)
    result = trl_host.run(cell, 1, settings, reference, lambda steps: None, spy)
    return result, policies, rollouts


@pytest.mark.parametrize("arm", ["none", "k2@loss/is:token", "k1@advantage"])
def test_sampler_lags_by_its_delay_and_hands_over_its_true_log_probs(arm, reference):
    result, policies, rollouts = run_spied(arm, 2, reference)
    tokenizer = model.tokenizer()
    assert len(policies) == QUICK.steps
    for step, out in enumerate(rollouts):
        given = torch.tensor([x for row in out["logprobs"] for x in row])
        ids = out["prompt_ids"], out["completion_ids"]
        torch.testing.assert_close(given, log_probs(policies[max(0, step - 2)], tokenizer, *ids), rtol=1e-4, atol=1e-4)
        if step >= 2:
            assert (given - log_probs(policies[step], tokenizer, *ids)).abs().max() > 1e-2
    # TRL divides by the sampler's probabilities, or it would find no ratio to clip.
    assert result["curve"][-1]["clip_ratio/region_mean"] > 0


def test_without_delay_the_sampler_is_the_policy(reference):
    result, policies, rollouts = run_spied("k2@loss/is:token", 0, reference)
    out = rollouts[-1]
    given = torch.tensor([x for row in out["logprobs"] for x in row])
    own = log_probs(policies[-1], model.tokenizer(), out["prompt_ids"], out["completion_ids"])
    torch.testing.assert_close(given, own, rtol=1e-4, atol=1e-4)
    assert result["curve"][-1]["clip_ratio/region_mean"] == 0
    assert result["curve"][-1]["kl/weight/max"] == pytest.approx(1.0, abs=1e-3)


def test_weight_is_that_of_the_lag(reference):
    result, _, _ = run_spied("k2@loss/is:token", 4, reference)
    assert result["curve"][-1]["kl/weight/max"] > 1.05
    assert result["curve"][-1]["kl/ess"] < 0.999


def test_bf16_sampler_draws_from_what_it_reports(reference):
    policy = models.load(reference).eval()
    sampler = LaggedSampler(0, "bf16", 3, 0)
    sampler.follow(policy)
    assert next(sampler.model.parameters()).dtype == torch.bfloat16
    prompts = ["3 + 4 ="] * 8000
    drawn = sample(sampler.model, model.tokenizer(), prompts, 1, torch.Generator().manual_seed(0))
    first = drawn.sequences[:, -1]
    frequency = torch.bincount(first, minlength=16) / len(first)
    reported = torch.zeros(16).index_put((first,), drawn.logp[:, 0].exp())
    assert (frequency - reported).abs().max() < 4 * math.sqrt(0.25 / len(first))
    own = sample(policy, model.tokenizer(), prompts[:64], 1, torch.Generator().manual_seed(0))
    shared = drawn.sequences[:64, -1] == own.sequences[:, -1]
    gap = (drawn.logp[:64, 0] - own.logp[:, 0])[shared].abs()
    assert 1e-5 < gap.max() < 0.1


def test_sample_ends_where_the_completion_ends(reference):
    policy = models.load(reference).eval()
    with torch.no_grad():
        policy.lm_head.weight[1] *= 6  # the end of the sequence comes early, and late
    tokenizer = model.tokenizer()
    drawn = sample(policy, tokenizer, ["3 + 4 ="] * 200, 3, torch.Generator().manual_seed(0))
    assert len({len(row) for row in drawn.completion_lists()}) > 1
    for ids, logp in zip(drawn.completion_lists(), drawn.log_prob_lists(), strict=True):
        assert 1 not in ids[:-1]
        assert len(ids) == len(logp)
    prompt = tokenizer("3 + 4 =")["input_ids"]
    expected = log_probs(policy, tokenizer, [prompt] * 200, drawn.completion_lists())
    torch.testing.assert_close(drawn.logp[drawn.mask], expected, rtol=1e-4, atol=1e-4)
