"""``behaviour:sampler``: the engine's log-probs, handed over through TRL's own rollout function."""

import pytest
import torch
import trl
from packaging.version import Version

from kl_plugins import KLSpec, kl_term
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from kl_plugins.adapters.trl.config import ASSUME_VARIABLE, ROLLOUT_WITHOUT_VLLM
from kl_plugins.patches.trl.trainer import session_of
from tests.support.trl import trainers
from tests.support.trl.states import TEMPERATURE, by_hand

GAP = 0.3

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < ROLLOUT_WITHOUT_VLLM, reason="this TRL calls rollout_func only with vLLM"
)


def engine():
    """A rollout function whose log-probs are a constant ``GAP`` off the policy's, as a mismatched engine's would be."""

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        generator = torch.Generator().manual_seed(0)
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        lengths = [3 + i % 4 for i in range(len(prompts))]
        completion_ids = [torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in lengths]
        logprobs = []
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1)[torch.arange(len(completion)), completion] - GAP
            logprobs.append(logp.tolist())
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    return rollout


def build(model, folder, spec, rollout=None, **changes):
    args = GRPOConfig(**trainers.settings(folder, kl=spec, num_iterations=2, loss_type="dapo", **changes))
    built = GRPOTrainer(
        model, trainers.zero_reward, args=args, train_dataset=trainers.prompts(), rollout_func=rollout or engine()
    )
    trainers.shift(built)
    return built


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("k2@loss/is:token/behaviour:sampler", "sampler"),
        ("k2@loss/is:token", "sampler"),
        ("k2@loss/is:sequence/cap:3", "sampler"),
        ("k2@loss/is:token/behaviour:old", "old"),
        ("k2@loss", "unused"),
    ],
)
def test_weight_divides_by_the_log_probs_that_the_receipt_names(spec, source, model, tmp_path):
    built = build(model, tmp_path, spec)
    assert session_of(built).receipt().behaviour == source
    inputs, found, _ = trainers.rollout_and_gradient(built)
    mask = inputs["completion_mask"].bool()
    assert mask.sum() < mask.numel()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logp = built._get_per_token_logps_and_entropies(built.model, ids, attention, mask.shape[1])[0]
    behaviour = {
        "sampler": {"sampler_logp": inputs["sampling_per_token_logps"]},
        "old": {"old_logp": inputs["old_per_token_logps"]},
        "unused": {},
    }[source]
    term = kl_term(KLSpec.parse(spec), logp, inputs["ref_per_token_logps"], mask, **behaviour)
    if spec == "k2@loss/is:token":
        torch.testing.assert_close(term.weight[mask], torch.full((int(mask.sum()),), GAP).exp(), rtol=1e-3, atol=1e-4)
    built.model.zero_grad()
    (built.beta * term.loss.sum() / inputs["num_items_in_batch"]).backward()
    expected = trainers.gradient(built)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_the_weight_of_what_top_leaves_out_divides_by_the_samplers(model, tmp_path, monkeypatch):
    monkeypatch.setenv(ASSUME_VARIABLE, "1")
    built = build(model, tmp_path, "exact@loss/top:3/is:token", temperature=TEMPERATURE)
    inputs, found, _ = trainers.rollout_and_gradient(built)
    mask = inputs["completion_mask"].bool()
    kl, logp, _, remainder = by_hand(built, inputs, 3)
    weight = (logp.detach() - inputs["sampling_per_token_logps"]).exp()
    built.model.zero_grad()
    term = (kl + weight * remainder * logp).masked_fill(~mask, 0.0)
    (built.beta * term.sum() / inputs["num_items_in_batch"]).backward()
    expected = trainers.gradient(built)
    assert (found - expected).norm() / expected.norm() < 1e-4


def silent(prompts, trainer):
    """A rollout function that gives no log-probs, although the sampler's are expected of it."""
    return {**engine()(prompts, trainer), "logprobs": None}


def test_without_log_probs_a_spec_stops_and_an_observation_goes_on(model, tmp_path):
    with pytest.raises(ValueError, match="return 'logprobs' from rollout_func"):
        build(model, tmp_path, "k2@loss/is:token", silent).train()
    watched = build(model, tmp_path, "observe:k2@loss/is:token", silent)
    watched.train()
    assert trainers.log_of(watched, "kl/observed") == [0.0, 0.0]


def test_metrics_show_the_mismatch(model, tmp_path):
    built = build(model, tmp_path, "k2@loss/is:token", learning_rate=1e-6)
    built.train()
    weight = torch.tensor(GAP).exp().item()
    assert trainers.log_of(built, "kl/weight/max")[0] == pytest.approx(weight, rel=1e-2)
    assert trainers.log_of(built, "kl/trust_region")[0] == pytest.approx(weight - 1 - GAP, rel=2e-2)
