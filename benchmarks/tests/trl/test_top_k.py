"""`benchmarks.top_k` from end to end with a tiny random model: training, states, judgement, files, and its refusals."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.llm import model
from benchmarks.tests.trl.study_support import needs_rollouts
from benchmarks.top_k import __main__ as program
from benchmarks.top_k import policies
from benchmarks.top_k.findings import KS, PAIRS, PERTURBED, TRAINED


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model.tiny(tmp_path_factory.mktemp("models") / "tiny")


def run(*arguments):
    return CliRunner().invoke(program.app, ["--smoke", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("top_k")
    made = run("--model", tiny, "--out", out)
    assert made.exit_code == 0, made.output
    assert "training 4 steps under default" in made.output
    return out


def test_the_smallest_run_trains_measures_and_judges(folder):
    found = json.loads((folder / "top_k.json").read_text())
    assert [policy["kind"] for policy in found["policies"]] == [TRAINED, PERTURBED]
    trained = found["policies"][0]
    assert trained["sequences"] == 16
    assert trained["states"] > 64
    assert trained["kl_per_token"] > 1e-4
    assert all(policy["difference_to_library"] < 1e-9 for policy in found["policies"])
    assert len(found["rows"]) == 2 * (2 + 2 * len(KS) + len(PAIRS))
    rows = [row for row in found["rows"] if row["kind"] == TRAINED and row["bucket"]]
    noise = [row["noise"] for row in rows if not row["draws"]]
    assert noise == sorted(noise, reverse=True)
    assert 0 < noise[0] < 1
    assert noise[-1] == 0.0  # the whole vocabulary
    assert found["training"]["settings"]["steps"] == 4
    assert found["k"] is None
    assert found["verdict"].startswith("From a smoke run, so it means nothing")
    text = (folder / "table.txt").read_text()
    assert found["verdict"] in text
    assert "mean nothing" in text
    assert (folder / "top_k.png").stat().st_size > 10_000


def test_a_policy_that_was_trained_before_is_taken(folder, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "classes", None)  # a training would need it
    before = json.loads((folder / "top_k.json").read_text())
    made = run("--model", tiny, "--policy", folder / "policy", "--perturb", "0", "--out", tmp_path)
    assert made.exit_code == 0, made.output
    found = json.loads((tmp_path / "top_k.json").read_text())
    assert found["training"] is None
    assert [policy["policy"] for policy in found["policies"]] == ["given: policy"]
    assert found["policies"][0]["kl_per_token"] == pytest.approx(before["policies"][0]["kl_per_token"], rel=1e-6)
    settings = program.Settings(**before["settings"])
    assert policies.train("default", 1, settings, folder / "policy") == before["training"]  # nothing is repeated


def test_results_are_judged_and_drawn_again(folder):
    before = json.loads((folder / "top_k.json").read_text())
    (folder / "top_k.png").unlink()
    assert run("--redraw", "--out", folder).exit_code == 0
    assert (folder / "top_k.png").exists()
    assert json.loads((folder / "top_k.json").read_text()) == before


@needs_rollouts
def test_the_sampler_of_gpu_runs_can_train_the_policy(tiny, tmp_path):
    settings = program.replace(program.SMOKE, model=str(tiny), delay=0, steps=2)
    record = policies.train("k2@loss", 1, settings, tmp_path)
    assert len(record["reward"]) == 2
    assert model.ready(tmp_path)


def test_states_end_where_completions_end(tiny):
    policy, reference = model.load(tiny, "cpu"), model.load(tiny, "cpu")
    policies.perturb(policy, 0.5, 1)
    with torch.no_grad():
        policy.lm_head.weight[1] *= 30  # ends many completions early
    settings = program.replace(program.SMOKE, model=str(tiny))
    visited = policies.visit(policy, reference, settings)
    counts = torch.bincount(visited.sequence, minlength=16)
    assert counts.min() >= 1
    assert counts.max() <= settings.tokens
    assert len(visited.noise.kl) == int(counts.sum()) < 16 * settings.tokens
    assert visited.difference < 1e-9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "nothing"), "no task 'nothing'"),
        (("--policy", "nowhere"), "nowhere holds no model"),
        (("--arm", "k9@loss"), "k9"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, words, tiny, tmp_path):
    made = run("--model", tiny, "--out", tmp_path, *arguments)
    assert made.exit_code == 2
    assert words in made.output


def test_a_policy_that_is_the_reference_is_refused(tiny, tmp_path):
    made = run("--model", tiny, "--policy", tiny, "--out", tmp_path)
    assert made.exit_code == 2
    assert "equals the reference" in " ".join(made.output.split())
    assert not list(tmp_path.iterdir())
