"""``python -m benchmarks.study``: tasks, references, measurement, refusals, resumption."""

import json
import math
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.demo import evaluate, model
from benchmarks.study import comparison, hosts, models, plan, trl_host
from benchmarks.study.__main__ import app
from benchmarks.study.comparison import Options
from benchmarks.study.measure import Measure
from benchmarks.study.settings import Cell, Settings
from benchmarks.study.tasks import TASKS
from benchmarks.study.text import completion_tokens, encoded, tokenizer_of
from benchmarks.tests.trl.study_support import QUICK, needs_rollouts

LIMIT = 280

pytestmark = needs_rollouts


def test_delay_under_reward_is_refused(reference):
    with pytest.raises(ValueError, match=r"k1@reward cannot .* delayed or bf16 sampler.*use @advantage"):
        trl_host.run(Cell("sums", "llama", "k1@reward", 1), 1, QUICK, reference, lambda steps: None)


@pytest.mark.parametrize("name", ["verl", "openrlhf", "nonsense"])
def test_other_hosts_are_refused(name):
    with pytest.raises(ValueError, match=r"is not installed here|no host 'nonsense'; there is trl"):
        hosts.find_host(name)


@pytest.mark.parametrize(
    ("task", "prompt", "right", "wrong"),
    [
        ("rare", "1 2 =", "2 * 5 + 2", "5 + 5 + 2"),
        ("common", "0 9 =", "3 * 3 + 0", "3 * 3 + 1"),
        ("sums", "7 + 5 =", "1 2", "1 3"),
        ("sums", "3 + 4 =", "0 7", "7"),
    ],
)
def test_rewards(task, prompt, right, wrong):
    made = TASKS[task]
    assert prompt in made.prompts
    assert made.reward([prompt] * 3, [right, wrong, right.replace(" ", "")]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("task", "share"), [("rare", 0.02), ("common", 0.5), ("sums", 0.4)])
def test_lines_hold_the_share_of_rewarded_ones_that_the_task_says(task, share):
    made = TASKS[task]
    lines = made.lines()
    assert sum(line.late for line in lines) == pytest.approx(1.0)
    assert sum(line.early for line in lines) == pytest.approx(1.0)
    found = sum(line.late * made.verify(line.prompt, line.completion) for line in lines)
    assert found == pytest.approx(share)
    space = set(made.space().rewarded.tolist())
    for line in lines[:: len(lines) // 50]:
        code = evaluate.code(evaluate.task.ids(f"{line.prompt} {line.completion} <eos>"))
        assert (code in space) == bool(made.verify(line.prompt, line.completion))


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("task", TASKS)
def test_references_are_rewarded_as_often_as_their_task_says(task, family, tmp_path):
    found = models.make_reference(tmp_path, task, family, Settings(), lambda steps: None)
    low, high = TASKS[task].expected
    assert low < found["reward"] < high
    assert found["coverage"] > 0.99
    assert (found["reward"] < 0.05) == (task == "rare")


def test_a_reference_outside_its_range_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Settings, "pretrain_steps", 30)
    with pytest.raises(ValueError, match=r"qwen2 reference of 'sums' is rewarded in .*%"):
        models.make_reference(tmp_path, "sums", "qwen2", Settings(pretrain_steps=30), lambda steps: None)


@pytest.mark.parametrize("end", [6, -6])  # completions end where they should, or most of them too early
def test_sampled_measures_agree_with_enumerated_ones(end, reference):
    task, tokenizer = TASKS["sums"], model.tokenizer()
    policy, anchor = models.load(reference).eval(), models.load(reference).eval()
    with torch.no_grad():
        policy.lm_head.weight *= 1.5
        policy.lm_head.weight[1] *= end
    exact = Measure(anchor, task, QUICK, tokenizer)(policy)
    sampled = Measure(anchor, task, Settings(model=str(reference), evaluation_samples=40), tokenizer)(policy)
    assert sampled["sampled"] == 4000
    assert exact["coverage"] > 0.98
    assert exact["kl"] > 0.3
    for name in ("kl", "entropy"):
        assert sampled[name] == pytest.approx(exact[name], rel=0.05)
    assert sampled["reward"] == pytest.approx(exact["reward"], abs=4 * math.sqrt(0.25 / 4000))


def test_a_given_model_is_trained_and_measured_from_samples(reference, tmp_path):
    settings = Settings(
        **{**vars(QUICK), "steps": 2, "evaluate_every": 2, "model": str(reference), "evaluation_samples": 2}
    )
    described = models.make_reference(tmp_path / "model", "sums", "given", settings, lambda steps: None)
    assert described["sampled"] == 200
    assert completion_tokens(TASKS["sums"], settings, tokenizer_of(settings)) == 3
    result = trl_host.run(Cell("sums", "given", "k2@loss", 1), 1, settings, tmp_path / "model", lambda steps: None)
    assert [point["step"] for point in result["curve"]] == [0, 2]
    assert result["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert result["curve"][-1]["kl"] > 1e-5


def test_lines_in_a_tokenizer_are_what_they_say():
    ids, mask, phases, first = encoded(TASKS["rare"], model.tokenizer())
    assert ids.shape == mask.shape == (len(TASKS["rare"].lines()), 9)
    assert mask.all()
    assert first == 3
    assert phases[0].sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.timeout(2 * LIMIT)
def test_study_resumes_and_repeats_only_what_is_missing(tmp_path):
    scope = plan.Scope(tasks=("sums",), families=("llama",), claims=("k1-reward-stable",))
    settings = Settings(**{**vars(QUICK), "steps": 2})

    def study(judge_only=False):
        options = Options(2, tmp_path, 1, judge_only=judge_only)
        comparison.study(Console(quiet=True), scope, settings, options)
        return json.loads((tmp_path / "study.json").read_text())

    with pytest.raises(ValueError, match="no finished run"):
        study(judge_only=True)
    first = study()
    assert (first["runs"], first["runs_reused"]) == (4, 0)
    assert (tmp_path / "verdicts.png").read_bytes().startswith(b"\x89PNG")
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 4
    before = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    files[1].write_text(files[1].read_text()[:200])  # torn
    judged = study(judge_only=True)
    assert (judged["runs"], judged["runs_planned"]) == (2, 4)
    assert not files[0].exists()
    again = study()
    assert again["runs_reused"] == 2
    assert again["cells"][0]["measures"] == first["cells"][0]["measures"]  # a repeated run is the same run
    after = {file: file.stat().st_mtime_ns for file in sorted((tmp_path / "runs").glob("*.json"))}
    assert after.keys() == before.keys()
    assert [file for file in files if after[file] == before[file]] == files[2:]


def command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_command_line_says_what_it_would_cost_and_refuses_nonsense(tmp_path):
    dry = command("--dry-run", "--tasks", "rare", "--seeds", "1", "--out", str(tmp_path))
    assert dry.exit_code == 0, dry.output
    assert "min on" in " ".join(dry.output.split())
    assert not list(tmp_path.iterdir())
    for arguments, said in (
        (("--host", "verl"), "verl is not installed here"),
        (("--tasks", "rars"), "no task"),
        (("--delays", "3"), "no delay"),
        (("--arms", "k2@los"), "loss"),
        (("--claims", "drif"), "no claim drif"),
        (("--tasks", "sums", "--delays", "16"), "nothing to run"),
    ):
        refused = command(*arguments, "--out", str(tmp_path))
        assert refused.exit_code == 2, refused.output
        assert said in " ".join(re.sub("[^a-z0-9@ ]", " ", refused.output).split())
