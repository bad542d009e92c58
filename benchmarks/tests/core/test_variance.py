"""The variance benchmark's closed forms against autograd, and one run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gradient_moments import (
    Blocks,
    exact_with_baseline,
    full_return,
    mean_gradient,
    moments,
    of_spec,
    problem_at,
)
from tests.support.oracle.expectation import loss_gradient, policy_gradient
from tests.support.oracle.problems import TOLERANCE, problems
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import relative_error, reverse_kl_of_sequences, target_gradient

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "text",
    ["k2@loss", "k3@loss/is:prefix", "exact@loss/horizon:sequence/is:decision", "k1@reward", "k1@advantage/future:k3"],
)
def test_mean_of_the_blocks_is_the_expected_gradient(text: str) -> None:
    spec = parse(text)
    data = "sampler" if spec.placement == "loss" else "current"
    for problem in problems():
        expected = loss_gradient(spec, problem, data) if spec.placement == "loss" else policy_gradient(spec, problem)
        assert relative_error(mean_gradient(problem, of_spec(spec, problem, data), data), expected) < TOLERANCE


@pytest.mark.parametrize("blocks", [full_return, exact_with_baseline])
def test_expressions_outside_the_grammar_are_unbiased(blocks: Blocks) -> None:
    for problem in problems():
        target = target_gradient(problem, "reverse_kl_sequence", "", "current")
        assert relative_error(mean_gradient(problem, blocks(problem), "current"), target) < TOLERANCE


def test_variance_is_that_of_the_gradients_written_out() -> None:
    problem = problems()[0]
    spec = parse("k1@reward")
    found = moments(problem, of_spec(spec, problem, "current"), "current")
    log_ratio = (problem.log_probs("current") - problem.log_probs("reference")).detach()
    to_go = log_ratio.flip(-1).cumsum(-1).flip(-1)
    target = target_gradient(problem, "reverse_kl_sequence", "", "current")
    second = 0.0
    for row, probability in enumerate(problem.probabilities("current").tolist()):
        gradient = problem.gradient((to_go[row] * problem.log_probs("current")[row]).sum())
        second += probability * float((gradient - target).square().sum())
    assert found.variance == pytest.approx(second / float(target.square().sum()), rel=1e-9)
    assert found.bias_sequence < TOLERANCE


def test_bisection_finds_the_distance() -> None:
    problem = problem_at(0.26, 3, 3, 0, scale=1.0, staleness=0.3)
    assert float(reverse_kl_of_sequences(problem).detach()) == pytest.approx(0.26, rel=1e-9)


def test_command_writes_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.variance", "--smoke", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "variance.json").read_text())["settings"][0]["rows"]
    assert rows["k1@reward"]["bias_sequence"] < TOLERANCE
    assert (tmp_path / "variance.png").stat().st_size > 10_000
