"""Some tokens of a completion are not the policy's: tools, environments and ``rollout_func``."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import AutoTokenizer

from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from kl_plugins.adapters.trl.config import ROLLOUT_WITHOUT_VLLM
from tests.support.trl import trainers
from tests.support.trl.states import TEMPERATURE, by_hand
from tests.support.trl.trainers import BETA, log_ratio

with_tools = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="written for the tool loop of TRL 1.16"
)
with_rollout = pytest.mark.skipif(
    Version(trl.__version__) < ROLLOUT_WITHOUT_VLLM, reason="this TRL calls rollout_func only with vLLM"
)

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% for call in m.get('tool_calls') or [] %}"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] }}{% endfor %}{% endfor %}"
)


def look_up(key: str) -> str:
    """Look something up.

    Args:
        key: a word.
    """
    return "12+34"


class Shelf:
    """An environment with one tool and a reward of its own."""

    def reset(self, **_: Any) -> None:
        self.asked = 0

    def look_up(self, key: str) -> str:
        """Look something up.

        Args:
            key: a word.
        """
        self.asked += 1
        return "12+34"

    def get_reward(self) -> float:
        return 0.0


def calling_tokenizer(model: str) -> Any:
    """The usual tokenizer, which reads a tool call out of every completion with a plus: a random model writes none."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE

    class Calling(type(tokenizer)):
        def parse_response(self, ids: list[int], **_: Any) -> dict[str, Any]:
            parsed: dict[str, Any] = {"role": "assistant", "content": self.decode(ids, skip_special_tokens=True)}
            if "+" in parsed["content"]:
                function = {"name": "look_up", "arguments": {"key": "1"}}
                parsed["tool_calls"] = [{"type": "function", "function": function}]
            return parsed

    tokenizer.__class__ = Calling
    tokenizer.response_schema = {"type": "object"}
    return tokenizer


def with_calls(model: str, folder: Path, external: dict[str, Any], spec: str = "k1@reward", **changes: Any) -> Any:
    settings = {"max_completion_length": 48, "scale_rewards": "none", "max_tool_calling_iterations": 2}
    questions = [{"prompt": [{"role": "user", "content": f"{i % 7}+{i % 5}="}]} for i in range(32)]
    built = GRPOTrainer(
        model,
        trainers.zero_reward,
        args=GRPOConfig(**trainers.settings(folder, kl=spec, **{**settings, **changes})),
        train_dataset=Dataset.from_list(questions),
        processing_class=calling_tokenizer(model),
        **external,
    )
    trainers.shift(built)
    return built


def interleaved(masks: list[list[int]] | None) -> Any:
    """A rollout function that mixes the policy's tokens with those of an environment, and says which are which."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        generator = torch.Generator().manual_seed(0)
        lengths = [4 + i % 4 for i in range(len(prompts))]
        ids = [torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in lengths]
        output = {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": ids,
            "logprobs": [[0.0] * n for n in lengths],
        }
        if masks is not None:
            output["env_mask"] = masks or [[1, 0, 0] + [1] * (n - 3) for n in lengths]
        return output

    return rollout


def with_rollout_func(model: str, folder: Path, masks: list[list[int]] | None) -> Any:
    args = GRPOConfig(**trainers.settings(folder, kl="k1@reward", scale_rewards="none"))
    built = GRPOTrainer(
        model, trainers.zero_reward, args=args, train_dataset=trainers.prompts(), rollout_func=interleaved(masks)
    )
    trainers.shift(built)
    return built


def check_rewards(built: Any) -> torch.Tensor:
    """The advantages are those of the KL of the policy's own tokens; returns the KL of all others."""
    inputs, _, _ = trainers.rollout_and_gradient(built)
    u, written = log_ratio(built, inputs), inputs["tool_mask"] * inputs["completion_mask"]
    reward = -BETA * (u * written).sum(-1).view(2, 4)
    expected = reward - reward.mean(1, keepdim=True)
    torch.testing.assert_close(inputs["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    found = built._metrics["train"]["rewards/kl_penalty/mean"][-1]
    assert found == pytest.approx(float(reward.mean() / BETA), rel=1e-4)
    assert built._metrics["train"]["kl/reverse_k1"][-1] == pytest.approx(
        float((u * written).sum() / written.sum()), rel=1e-3
    )
    return (u * (inputs["completion_mask"] - written)).sum(-1)


@with_tools
@pytest.mark.parametrize(
    "external", [{"tools": [look_up]}, {"environment_factory": Shelf}], ids=["tools", "environment"]
)
def test_what_tools_answer_costs_no_kl(external, model, tmp_path):
    built = with_calls(model, tmp_path, external)
    answered = check_rewards(built)
    assert built._metrics["train"]["tools/call_frequency"][-1] > 0
    assert answered.abs().max() > 0.1
    assert "_generate" not in vars(built)


@with_tools
@pytest.mark.parametrize("spec", ["k2@loss", "exact@loss", "exact@loss/top:15"])
def test_what_tools_answer_is_no_part_of_a_loss(spec, model, tmp_path):
    built = with_calls(model, tmp_path, {"tools": [look_up]}, spec, temperature=TEMPERATURE, loss_type="dapo")
    inputs, ours, _ = trainers.rollout_and_gradient(built)
    mask = (inputs["tool_mask"] * inputs["completion_mask"]).bool()
    assert mask.sum() < inputs["completion_mask"].sum()
    assert inputs["num_items_in_batch"] == mask.sum()
    kl, logp, *_ = by_hand(built, inputs)  # the vocabulary has 15 tokens, so top:15 is exact
    exact = None if spec == "k2@loss" else kl
    term = kl_term(KLSpec.parse(spec.split("/")[0]), logp, inputs["ref_per_token_logps"], mask, exact=exact)
    built.model.zero_grad()
    (BETA * term.loss.sum() / mask.sum()).backward()
    expected = trainers.gradient(built)
    assert expected.norm() > 0
    assert (ours - expected).norm() / expected.norm() < 1e-4


@with_tools
def test_what_tools_answer_changes_no_advantage(model, tmp_path):
    built = with_calls(model, tmp_path, {"tools": [look_up]}, "k1@advantage")
    inputs, _, _ = trainers.rollout_and_gradient(built)
    u, mask = log_ratio(built, inputs), (inputs["tool_mask"] * inputs["completion_mask"]).bool()
    assert mask.sum() < inputs["completion_mask"].sum()
    expected = -BETA * kl_penalty(KLSpec.parse("k1@advantage"), u, torch.zeros_like(u), mask)
    torch.testing.assert_close(inputs["advantages"], expected, rtol=1e-4, atol=1e-5)


@with_tools
def test_a_run_with_tools_trains(model, tmp_path):
    built = with_calls(model, tmp_path, {"tools": [look_up]}, num_iterations=2)
    built.train()
    assert trainers.log_of(built, "kl/active") == [1.0, 1.0]
    assert all(value > 0 for value in trainers.log_of(built, "tools/call_frequency"))


@with_rollout
def test_what_the_environment_of_a_rollout_function_writes_costs_no_kl(model, tmp_path):
    assert check_rewards(with_rollout_func(model, tmp_path, masks=[])).abs().max() > 0.1


@with_rollout
def test_a_rollout_function_without_a_mask_writes_all_itself(model, tmp_path):
    built = with_rollout_func(model, tmp_path, masks=None)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    reward = -BETA * log_ratio(built, inputs).sum(-1).view(2, 4)
    expected = (reward - reward.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(inputs["advantages"], expected, rtol=1e-4, atol=1e-5)


@with_rollout
def test_a_mask_of_another_length_is_refused(model, tmp_path):
    # TRL itself would take the missing ones as the policy's.
    built = with_rollout_func(model, tmp_path, masks=[[1, 0, 0]] * 8)
    with pytest.raises(RuntimeError, match="env_mask that is as long"):
        trainers.rollout_and_gradient(built)
    assert "_generate" not in vars(built)


@with_tools
def test_tools_without_a_mask_are_refused(model, tmp_path):
    built = with_calls(model, tmp_path, {"tools": [look_up]})
    generate = built._generate

    def without_mask(prompts: list[Any]) -> tuple[Any, ...]:
        prompt_ids, completion_ids, _, *others = generate(prompts)
        return prompt_ids, completion_ids, None, *others

    built._generate = without_mask
    with pytest.raises(RuntimeError, match="does not say for each token"):
        trainers.rollout_and_gradient(built)
    assert built._generate is without_mask
