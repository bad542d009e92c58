"""The language model's runs in their smallest form, with a tiny random model: sampling, staleness, resumption."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import demo_llm
from benchmarks.demo import model as small
from benchmarks.llm import crew, demo, model, sampler, staleness, train, trl_steps
from benchmarks.llm.decode import Decoder, Plain, drawer
from benchmarks.llm.measure import Measure
from benchmarks.llm.measure import staleness as weights_of
from benchmarks.llm.tasks import prompts_of
from benchmarks.study.sampler import completion_log_probs
from benchmarks.tests.trl.study_support import needs_rollouts

TOKENS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model.tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return model.tokenizer_of(tiny)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return prompts_of("letter", tokenizer)


@pytest.fixture
def settings(tiny):
    return replace(demo.SMOKE, model=str(tiny), steps=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_decoder_gives_the_models_own_log_probs(tokenizer, prompts, family):
    torch.manual_seed(1)
    policy = small.blank_model(1, family, hidden=32).eval()
    policy.resize_token_embeddings(len(tokenizer))
    for parameter in policy.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    texts = [prompts.trained[0], f"sea sun . {prompts.trained[1]}"]  # of different lengths
    made = drawer(policy, tokenizer, 4, 20, 9)
    assert isinstance(made, Decoder)
    drawn = made.draw(texts, generator())
    assert drawn.sequences.shape == (2, 29)
    logp = completion_log_probs(policy, drawn)
    torch.testing.assert_close(drawn.logp, logp, atol=2e-5, rtol=0)
    again = made.draw(texts, generator())
    assert torch.equal(drawn.sequences, again.sequences)
    assert not torch.equal(drawn.sequences, made.draw(texts, generator(1)).sequences)


def test_decoder_stops_at_the_end_and_draws_by_the_models_probabilities(tiny, tokenizer, prompts):
    policy = model.load(tiny, "cpu")
    made = drawer(policy, tokenizer, 512, 20, 4)
    drawn = made.draw([prompts.trained[0]] * 512, generator())
    ids = drawn.sequences[:, drawn.prompt_ids.shape[1] :]
    ended = (ids == tokenizer.eos_token_id) & drawn.mask
    after = ended.cumsum(1) - ended.long() > 0
    assert not drawn.mask[after].any()
    assert (ids[after] == tokenizer.pad_token_id).all()
    assert drawn.mask.sum(1).tolist() == [len(row) for row in drawn.completion_lists()]
    with torch.no_grad():
        expected = policy(**tokenizer(prompts.trained[0], return_tensors="pt")).logits[0, -1].softmax(-1)
    share = torch.bincount(ids[:, 0], minlength=len(expected)) / 512
    assert (share - expected).abs().max() < 5 * (expected.max() / 512) ** 0.5


def test_other_models_are_sampled_by_their_own_forward_pass(tiny, tokenizer, prompts):
    policy = model.load(tiny, "cpu")
    policy.config.model_type = "another"
    made = drawer(policy, tokenizer, 4, 20, TOKENS)
    assert isinstance(made, Plain)
    assert made.draw(list(prompts.trained[:3]), generator()).logp.shape[0] == 3


def test_sampler_is_as_many_updates_behind_as_it_should_be(tiny, tokenizer, prompts):
    policy = model.load(tiny, "cpu")
    lagged = sampler.LaggedSampler(tiny, "cpu", 2, tokenizer, (2, 20, TOKENS), 1)
    for update in range(5):
        with torch.no_grad():
            policy.model.norm.weight.fill_(float(update))
        lagged.follow(policy)
        assert lagged.model.model.norm.weight[0].item() == max(update - 2, 0)


def test_measurement_of_the_reference_itself(tiny, tokenizer, prompts, settings):
    policy, reference = model.load(tiny, "cpu"), model.load(tiny, "cpu")
    measured = Measure(reference, prompts, tokenizer, settings, 20)(policy)
    assert measured["kl"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < measured["entropy"] < measured["tokens"] * torch.tensor(float(model.TINY_WORDS)).log()
    drawn = drawer(policy, tokenizer, 4, 20, TOKENS).draw(list(prompts.trained[:4]), generator())
    weights = weights_of(policy, drawn)
    assert weights["ess"] == pytest.approx(1.0, abs=1e-4)
    assert weights["below_0.5"] == 0.0


@needs_rollouts
def test_run_with_a_lagging_sampler(settings):
    ticks = []
    lagged = replace(settings, delay=1, steps=3, learning_rate=1e-2)
    made = train.run("k2@loss/is:token/floor:0.5", 1, lagged, 1, ticks.append)
    assert ticks[-1] == 3
    assert [point["step"] for point in made["curve"]] == [0, 2, 3]
    assert made["curve"][-1]["kl"] > 0
    assert "train/kl/floor_frac" in made["curve"][-1]
    assert [w["step"] for w in made["weights"]] == [0, 2]
    assert made["weights"][0]["ess"] == pytest.approx(1.0, abs=1e-3)
    assert made["weights"][-1]["ess"] < 0.9999
    assert len(made["step_seconds"]) == len(made["sampling_seconds"]) == 3


def test_a_run_that_fails_or_comes_too_late_ends_no_other(settings, monkeypatch):
    assert "time was over" in crew.attempt("none", 1, settings, 1, 0.0, lambda steps: None)["missing"]

    def broken(*arguments):
        raise RuntimeError("no memory\nmore")

    monkeypatch.setattr(train, "run", broken)
    assert crew.attempt("none", 1, settings, 1, None, lambda steps: None)["missing"] == "RuntimeError: no memory"


def test_most_valuable_runs_come_first():
    made = list(staleness.order(["none", "default"], [16, 4], 2))
    assert made[:3] == [("none", 1, 16), ("default", 1, 16), ("none", 1, 4)]
    assert {seed for _, seed, _ in made[:4]} == {1}


def test_blocks_of_steps_are_summed_up():
    block = {"seconds": [1.0, 1.2], "sampling": [0.5, 0.5], "peak_bytes": 2_000_000_000, "base_bytes": 1}
    slow = {**block, "seconds": [1.5, 1.7]}
    found = trl_steps.summary({"trl": [block, block], "default": [slow], "broken": []})
    assert found["default"]["update_ratio"]["median"] == pytest.approx(1.1 / 0.6)
    assert "broken" not in found


def test_demonstration_ends_with_table_and_picture_and_goes_on_where_it_stopped(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--smoke", "--model", str(tiny), "--arms", "none,exact@loss", "--out", str(tmp_path), "--steps", "2"]
    first = CliRunner().invoke(demo_llm.app, arguments)
    assert first.exit_code == 0, first.output
    assert "2 of 2 runs" in first.output
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [p["step"] for p in found["arms"]["exact@loss"]["curve"]] == [0, 2]
    assert any("exact@loss active" in line for line in found["plugin_log"]["exact@loss"])
    assert "not evidence" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    again = CliRunner().invoke(demo_llm.app, arguments)
    assert "0 of 2 runs" in again.output


def test_a_model_that_is_not_there_is_named(tmp_path):
    result = CliRunner().invoke(demo_llm.app, ["--model", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{tmp_path} holds no model" in result.output
    with pytest.raises(model.NoModelError, match=r"no \*.gguf and no wheel"):
        model.provide("", tmp_path / "made", source=tmp_path)
