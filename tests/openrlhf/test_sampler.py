"""The sampler's log-probs from vLLM to the loss: asked for where a spec needs them, marked where they are missing."""

import asyncio
import copy
from types import SimpleNamespace

import pytest
import torch
from openrlhf.models.loss import PolicyLoss
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray import vllm_engine
from openrlhf.utils.agent import SingleTurnAgentExecutor
from vllm import SamplingParams

from kl_plugins.adapters.openrlhf import attach
from kl_plugins.adapters.openrlhf.batch import MISSING, unmarked
from kl_plugins.patches.openrlhf import launcher
from tests.support.openrlhf.command_line import CORRECTED, LOSS, REWARD, SAMPLER, SPEC, parse

GSPO = ("--actor.policy_loss_type", "gspo")


@pytest.fixture(autouse=True)
def attached():
    attach()


class Remote:
    """A method of a Ray actor, called here."""

    def __init__(self, function):
        self.remote = function


def dispatched(args, **settings):
    """The sampling parameters with which the host's generator dispatches one prompt."""
    engine = SimpleNamespace(
        get_num_unfinished_requests=Remote(lambda: ray_value(0)),
        generate_responses=Remote(lambda **given: given["sampling_params"]),
    )
    generator = SamplesGenerator(SimpleNamespace(args=args), None, None, None, [engine])
    (params,) = generator._dispatch_prompts_to_vllm(["1+1="], ["2"], max_new_tokens=4, **settings)
    return params


def ray_value(value):
    import ray

    return ray.put(value)


@pytest.mark.parametrize(
    ("flags", "log_probs"),
    [
        ((), None),
        ((SPEC, "k2", "--algo.kl.use_loss"), None),
        (CORRECTED, 1),
        (LOSS, None),
        ((*LOSS, *CORRECTED), 1),
        (SAMPLER, 1),
        ((*SAMPLER, *GSPO), 1),
        ((*SAMPLER, *CORRECTED), 1),
        (REWARD, None),
    ],
)
def test_log_probs_are_asked_for_where_the_spec_or_openrlhf_needs_them(cluster, assets, flags, log_probs):
    params = dispatched(parse(assets, flags))
    assert isinstance(params, SamplingParams)
    assert params.logprobs == log_probs


PREFIX = ("--algo.kl.use_loss", SPEC, "k2@loss/is:prefix/behaviour:sampler")


def test_settings_that_only_another_launcher_passes_are_checked(cluster, assets, monkeypatch):
    monkeypatch.delenv("KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS", raising=False)
    for given, words in (({"top_k": 20}, "top_k 20"), ({"top_p": 0.9}, "top_p 0.9")):
        with pytest.raises(ValueError, match=f"is:prefix multiplies .* truncated sampling .{words}"):
            dispatched(parse(assets, PREFIX), **given)
        assert dispatched(parse(assets, SAMPLER), **given).logprobs == 1
        assert dispatched(parse(assets, (SPEC, "k1@reward")), **given).logprobs is None
    monkeypatch.setenv("KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS", "1")
    assert dispatched(parse(assets, PREFIX), top_k=20).top_k == 20


@pytest.mark.parametrize(("flags", "mode"), [((), "none"), (LOSS, "none"), (SAMPLER, "processed_logprobs")])
def test_engines_are_told_at_their_start(monkeypatch, assets, flags, mode):
    seen = {}

    class Engine:
        @staticmethod
        def options(**_):
            return Engine

        @staticmethod
        def remote(**given):
            seen.update(given)

    monkeypatch.setattr(vllm_engine, "RolloutRayActor", Engine)
    monkeypatch.setattr(vllm_engine, "PlacementGroupSchedulingStrategy", lambda **_: None)
    parse(assets, flags)
    arguments = (1, 1, "model", 0, False, False, True, 64, "group", 0.5, False, None)
    vllm_engine.create_vllm_engines(*arguments, remote_rm_url="r.py")
    assert seen.get("logprobs_mode", "none") == mode
    assert seen["remote_rm_url"] == "r.py"
    assert seen.get("max_logprobs") == (1 if mode != "none" else None)


class Engine:
    """Answers as vLLM's engine does, with the log-probs given."""

    def __init__(self, found):
        self.found = found

    async def generate(self, tokens, params, multi_modal_data=None):
        response = [7, 8, 9]
        output = SimpleNamespace(token_ids=response, finish_reason="stop", logprobs=self.found, text="")
        return SimpleNamespace(outputs=[output])


def answered(found, asked=1):
    """What the host's own executor makes of the answer."""

    def tokenizer(text, **_):
        return {"input_ids": torch.tensor([[3, 4]])}

    return asyncio.run(
        SingleTurnAgentExecutor().execute(
            prompt="p",
            label="l",
            sampling_params=SamplingParams(max_tokens=4, logprobs=asked),
            max_length=16,
            hf_tokenizer=tokenizer,
            llm_engine=Engine(found),
        )
    )


def value(x):
    return SimpleNamespace(logprob=x)


def test_a_missing_log_prob_is_marked_and_a_probability_of_one_is_not():
    response = answered([{7: value(-1.5)}, {5: value(-0.1)}, {9: value(0.0)}])
    assert response["rollout_log_probs"] == [0.0, 0.0, -1.5, MISSING, 0.0]
    found = unmarked(torch.tensor(response["rollout_log_probs"]), torch.zeros(5), required=True)
    assert found.isfinite().tolist() == [True, True, True, False, True]
    assert answered([{7: value(-1.5)}, {8: value(-1.0)}, {9: value(-2.0)}])["rollout_log_probs"][2:] == [
        -1.5,
        -1.0,
        -2.0,
    ]
    assert answered(None, asked=None)["rollout_log_probs"] is None


@pytest.mark.parametrize(("flags", "filled"), [(SAMPLER, MISSING), ((), 0.0)])
def test_log_probs_left_out_at_the_end_are_missing(assets, flags, filled):
    # Two of three response tokens have one: by padding with others they would become 0.0.
    response = answered([{7: value(-1.5)}, {8: value(-1.0)}])
    assert len(response["rollout_log_probs"]) == 4
    generator = SamplesGenerator(SimpleNamespace(args=parse(assets, flags)), None, None, None, [])
    full = answered([{7: value(-1.5)}, {8: value(-1.0)}, {9: value(-3.0)}])
    process = generator._process_response_into_experience
    made = [process(copy.deepcopy(response)), process(response=copy.deepcopy(full), max_len=16)]
    rows = Experience.concat_experiences(made, 0).rollout_log_probs
    assert rows.tolist() == [[0.0, -1.5, -1.0, pytest.approx(filled, abs=0)], [0.0, -1.5, -1.0, -3.0]]


@pytest.mark.parametrize("gating", ["ratio", "binary_kl", "tv"])
@pytest.mark.parametrize("level", ["off", "token", "seq"])
def test_the_mark_is_openrlhfs_own_zero_to_its_policy_loss(level, gating):
    threshold = (0.5, 5.0) if gating == "ratio" else (0.0, 0.5)
    loss = PolicyLoss(
        is_correction_level=level,
        is_correction_mode="mask",
        is_correction_gating=gating,
        is_correction_threshold=threshold,
    )
    random = torch.Generator().manual_seed(0)
    logp, old, advantages = (torch.randn(2, 4, generator=random) - shift for shift in (3, 3, 0))
    sampler = old + 0.1
    found = []
    for missing in (0.0, MISSING):
        sampler[0, 1] = missing
        found.append(loss(logp, old, advantages, torch.ones(2, 4), sampler.clone()))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or a.equal(b)


def test_arguments_of_another_program_leave_the_engines_alone(assets):
    from openrlhf.utils.config import hierarchize

    parse(assets, SAMPLER)
    assert launcher._launched
    assert hierarchize(SimpleNamespace(**{"model.name": "x"})).model.name == "x"
    assert not launcher._launched
