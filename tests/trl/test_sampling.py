"""How completions are sampled, and which log-probs the engine reports: read, shown, and refused where they mislead."""

import pytest
from packaging.version import Version

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from kl_plugins.adapters.trl.config import (
    ASSUME_VARIABLE,
    PROCESSED,
    ROLLOUT_WITHOUT_VLLM,
    SERVED_BY_VLLM,
    installed,
    mode_in,
    sampling_of,
)
from tests.contract.checks import BY_OLD, BY_SAMPLER
from tests.support.trl import trainers
from tests.support.trl.contract_driver import environment, refusal_of, rollout, vllm_server

HOT = {"temperature": 0.7}

served_by_vllm = pytest.mark.skipif(installed() < SERVED_BY_VLLM, reason="this TRL's own server sets the mode itself")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "the whole distribution"),
        ({"top_k": 0, "min_p": 0.0, "generation_kwargs": {"presence_penalty": 0.0}}, "the whole distribution"),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
            "temperature 0.7, top_p 0.9, top_k 20, min_p 0.1",
        ),
        ({"repetition_penalty": 1.1}, "penalties"),
        ({"top_p": 0.5, "generation_kwargs": {"top_p": 0.9}}, "top_p 0.9"),
        ({"generation_kwargs": {"frequency_penalty": 0.5}}, "penalties"),
        ({"generation_kwargs": '{"bad_words": ["x"], "top_k": 5}'}, "top_k 5, penalties"),
        ({"generation_kwargs": {"do_sample": False}}, "penalties"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "penalties"),
    ],
)
def test_settings_of_generation(changes, expected, tmp_path):
    if isinstance(changes.get("generation_kwargs"), str) and "generation_kwargs" not in GRPOConfig._VALID_DICT_FIELDS:
        pytest.skip("this TRL takes no generation_kwargs as JSON")
    config = GRPOConfig(**trainers.settings(tmp_path, **changes))
    assert str(sampling_of(config, PROCESSED)) == f"{expected}, processed log-probs"


def in_server_mode(tmp_path, mode, spec=BY_SAMPLER, **changes):
    with vllm_server(mode) as port:
        engine = {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": port}
        return refusal_of(GRPOTrainer, GRPOConfig, **trainers.settings(tmp_path, kl=spec, **{**engine, **changes}))


@served_by_vllm
def test_a_server_is_asked_for_its_mode(tmp_path):
    assert in_server_mode(tmp_path, "processed_logprobs", **HOT) == ""
    for mode in ("raw_logprobs", "raw_logits"):
        refusal = in_server_mode(tmp_path, mode, **HOT)
        assert "reports raw log-probs" in refusal
        assert "--logprobs-mode" in refusal
        assert "temperature 0.7" in refusal
    assert "truncated" in in_server_mode(tmp_path, "raw_logprobs", top_p=0.9)
    assert in_server_mode(tmp_path, "raw_logprobs") == ""
    for spec in (BY_OLD, "k2@loss", "k1@advantage"):
        assert in_server_mode(tmp_path, "raw_logprobs", spec, **HOT) == ""


@served_by_vllm
def test_a_server_that_does_not_say_is_refused_unless_the_user_vouches_for_it(tmp_path):
    nothing_there = {"vllm_server_port": 1, "vllm_server_timeout": 0.0}
    for refusal in (in_server_mode(tmp_path, None, **HOT), in_server_mode(tmp_path, None, **HOT, **nothing_there)):
        assert "may report raw log-probs" in refusal
        assert ASSUME_VARIABLE in refusal
    assert in_server_mode(tmp_path, None) == ""
    with environment(**{ASSUME_VARIABLE: "1"}):
        assert in_server_mode(tmp_path, None, **HOT) == ""


@pytest.mark.skipif(installed() < ROLLOUT_WITHOUT_VLLM, reason="this TRL calls rollout_func only with vLLM")
def test_a_rollout_function_may_report_anything(tmp_path):
    settings = trainers.settings(tmp_path, kl=BY_SAMPLER)
    assert "may report raw" in refusal_of(GRPOTrainer, GRPOConfig, rollout, **settings, **HOT)
    assert refusal_of(GRPOTrainer, GRPOConfig, rollout, **settings) == ""
    with environment(**{ASSUME_VARIABLE: "1"}):
        assert refusal_of(GRPOTrainer, GRPOConfig, rollout, **settings, **HOT) == ""


@pytest.mark.parametrize(
    ("changes", "version", "mode"),
    [
        ({"vllm_mode": "colocate"}, SERVED_BY_VLLM, PROCESSED),
        ({"vllm_mode": "server"}, SERVED_BY_VLLM, None),
        ({"vllm_mode": "server"}, Version("1.10.0"), PROCESSED),
    ],
)
def test_who_sets_the_mode(changes, version, mode, tmp_path):
    config = GRPOConfig(**trainers.settings(tmp_path, use_vllm=True, **changes))
    assert mode_in(config, False, version) == mode
