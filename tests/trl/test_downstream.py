"""The comparison with TRL's own tests, on a stand-in for them: it notices what stops passing."""

import json
from pathlib import Path

import pytest

from tests.downstream import hub, trl

pytestmark = pytest.mark.full

SUITE = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

def length(completions, **_):
    return [float(len(text)) for text in completions]

class TestGRPOTrainer:
    def test_train(self, tmp_path):
        args = GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
            report_to="none", beta=0.1, max_steps=1,
        )
        GRPOTrainer(
            "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", reward_funcs=length,
            args=args, train_dataset=load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train"),
        ).train()

    def test_fields(self):
        assert "kl" not in GRPOConfig.__dataclass_fields__

    def test_broken(self):
        raise AssertionError
"""


@pytest.fixture
def compare(tmp_path: Path):
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_grpo_trainer.py").write_text(SUITE)

    def run(select: str) -> tuple[int, dict[str, dict]]:
        options = ["--vocabulary", "320", "--specs", '{"GRPO": "k2@loss"}', "--", "-k", select]
        code = trl.main(["--tests", str(tests), "--out", str(tmp_path), *options])
        return code, json.loads((tmp_path / "summary.json").read_text())

    return run


def test_what_passes_with_stock_trl_passes_attached(compare):
    code, summary = compare("test_train or test_broken")
    assert code == 0
    # Broken before is no regression.
    assert [(run["passed"], run["failed"]) for run in summary.values()] == [(1, 1), (1, 1), (1, 0)]
    assert [run["under a spec"] for run in summary.values()] == [0, 0, 1]


def test_what_stops_passing_is_named(compare):
    code, summary = compare("test_train or test_fields")
    assert code == 1
    assert list(summary["attached"]["regressions"]) == ["TestGRPOTrainer::test_fields"]


def test_nothing_tested_is_no_success(compare):
    code, _ = compare("fields and broken")
    assert code == 1


def test_names_of_stand_ins(tmp_path):
    file = tmp_path / "test.py"
    file.write_text('a = "trl-internal-testing/zen", "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"')
    assert hub.named_in([file]) == {"zen", "tiny-Qwen2ForCausalLM-2.5"}
    assert hub.build(["tiny-LlavaForConditionalGeneration", "zen"], tmp_path) == ["tiny-LlavaForConditionalGeneration"]
