"""``kl-plugins explain --host``: what it prints, its JSON, its exit status, and what it does not import."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.configs import explained

from .conftest import document, run_cli, words

CONFIG = (
    "beta: 0.04\nloss_type: dr_grpo\nmax_completion_length: 256\nnum_iterations: 2\nuse_bias_correction_kl: false\n"
)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "grpo.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_the_text_says_what_is_optimised_and_where_it_comes_from(config: str) -> None:
    result = run_cli("explain", "--host", "TRL", config, env={"COLUMNS": "200"})
    said = words(result.stdout)
    assert result.returncode == 0, result.stderr
    for text in (
        "k3 of every token, without a weight, in the loss",
        "Its gradient is that of k3@loss.",
        "gradient of KL(reference || policy)",
        "each rollout serves 2 optimizer steps",
        f"from: use_bias_correction_kl=False ({config}:5)",
        "source: arXiv 2510.01555",
        "-> use the spec `default`",
        "Errors: 0. Warnings:",
    ):
        assert text in said
    assert "What we suggest" not in said


def test_suggestions_are_ready_to_paste_with_the_equivalent_beta(config: str) -> None:
    said = words(run_cli("explain", "--suggest", config, "--host=trl", "--length", "64").stdout)
    assert "kl: k3@loss beta: 0.04" in said
    assert "kl: default beta: 0.04" in said
    assert "beta 0.04 here = beta 0.01 under a mean over all response tokens" in said
    said = words(run_cli("explain", "--host", "trl", config, "--suggest").stdout)
    assert "beta 0.04 x (mean response length) / 256" in said


def test_json_has_everything_and_one_document(config: str) -> None:
    result = run_cli("explain", "--host", "trl", config, "--json")
    found = document(result)
    assert found["host"] == "trl"
    assert found["findings"][0].keys() == {"rule", "severity", "setting", "statement", "source", "remedy"}
    assert f"beta=0.04 ({config}:1)" in found["settings"]
    assert "suggestions" not in found
    assert document(run_cli("explain", "--host", "trl", config, "--json", "--suggest"))["suggestions"]


def test_an_error_gives_status_1_and_comes_first() -> None:
    result = run_cli("explain", "--host", "trl", "beta=0.1", "importance_sampling_level=sequence", "--json")
    assert result.returncode == 1
    assert document(result)["findings"][0]["rule"] == "trl-sequence-ratio-on-tokens"


def test_arguments_replace_what_a_file_says_and_may_follow_two_dashes(config: str) -> None:
    for arguments in ((config, "--beta", "0"), (config, "--", "--beta", "0"), (config, "beta=0")):
        found = document(run_cli("explain", "--json", "--host", "trl", *arguments))
        assert found["statements"]["KL"].startswith("none")


def test_the_version_changes_what_is_said() -> None:
    def spec(version: str) -> str:
        found = document(run_cli("explain", "--host", "trl", "--version", version, "beta=0.1", "--json"))
        assert found["version"] == version
        return str(found["statements"]["as a spec"])

    assert "k3@loss." in spec("1.9.0")
    assert "k2@loss/is:token/behaviour:old." in spec("1.10.0")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--host", "trl"), "needs a CONFIG"),
        (("--host", "nohost", "beta=1"), "no host 'nohost'"),
        (("--host", "trl", "none.yaml"), "cannot read none.yaml"),
        (("--host", "trl", "beta=1", "--version", "new"), "Invalid version"),
        (("--host", "trl", "beta=1", "--length", "long"), "'long' is no number of tokens"),
    ],
)
def test_wrong_input_gives_status_2(arguments: tuple[str, ...], problem: str) -> None:
    result = run_cli("explain", *arguments)
    assert result.returncode == 2
    assert problem in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_without_a_host_gets_a_hint_and_help_names_the_hosts(config: str) -> None:
    result = run_cli("explain", config)
    assert result.returncode == 2
    assert "add --host" in result.stderr
    assert "trl" in result.stderr
    said = run_cli("explain", "--host", "trl", "--help")
    assert said.returncode == 0
    assert "usage: kl-plugins explain --host" in said.stdout


def test_a_config_that_hydra_selects_is_read_below_the_overrides(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("actor_rollout_ref:\n  actor:\n    use_kl_loss: true\n    kl_loss_coef: 0.5\n")
    words_ = ["--config-path", str(tmp_path), "--config-name", "mine", "actor_rollout_ref.actor.kl_loss_coef=0.25"]
    told = explained("verl", " ".join(words_))
    assert "beta is 0.25" in told.statements["KL"]
    gone = explained("verl", "--config-name gone actor_rollout_ref.actor.kl_loss_coef=0.25")
    assert "gone" in next(finding for finding in gone.findings if finding.rule == "reading").statement
    assert "reading" not in {finding.rule for finding in explained("verl", "--config-name ppo_trainer a=1").findings}


def test_asynchronous_runs_get_the_engines_log_probs_suggested() -> None:
    (suggestion,) = [
        s for s in explained("openrlhf", "--algo.kl.use_loss --train.async_enable").suggestions if "suggest" in s.title
    ]
    assert "behaviour:sampler" in suggestion.lines[0]
    words_ = "actor_rollout_ref.actor.use_kl_loss=True trainer.v1.trainer_mode=separate_async"
    lines = [line for s in explained("verl", words_).suggestions for line in s.lines]
    assert "actor_rollout_ref.rollout.calculate_log_probs=True" in lines


def test_a_spec_is_not_replaced_by_another_one() -> None:
    titles = {s.title for s in explained("trl", "beta=0.1 kl=exact@loss").suggestions}
    assert titles == {"The equivalent beta elsewhere"}


@pytest.mark.parametrize(
    ("host", "lines"),
    [("trl", 2), ("verl", 3), ("openrlhf", 3)],
)
def test_what_is_suggested_is_accepted_and_says_what_it_promises(host: str, lines: int) -> None:
    native = {"trl": "beta=0.04", "verl": "actor_rollout_ref.actor.use_kl_loss=True", "openrlhf": "--algo.kl.use_loss"}[
        host
    ]
    suggested = [s for s in explained(host, native).suggestions if "equivalent" not in s.title]
    assert suggested
    for suggestion in suggested:
        assert len(suggestion.lines) == lines
        pasted = " ".join(line.replace(": ", "=") for line in suggestion.lines)
        told = explained(host, pasted)
        assert not [finding for finding in told.findings if finding.rule == "refused"], pasted
        beta = explained(host, native).statements["KL"].partition("beta is ")[2]
        assert told.statements["KL"].partition("beta is ")[2] == beta
