"""``kl-plugins explain``: exit statuses, JSON, errors, narrow terminals and pipes."""

import pytest

from .conftest import document, run_cli, words


def test_explains_a_spec() -> None:
    result = run_cli("explain", "k3@loss")
    assert (result.returncode, result.stderr) == (0, "")
    assert "k3 as a loss gives the forward KL's gradient" in words(result.stdout)
    assert "grpo" in result.stdout


def test_json_has_every_part() -> None:
    result = run_cli("explain", "default", "--json")
    it = document(result)
    assert result.returncode == 0
    assert it["spec"] == "k2@loss/is:token/floor:0.5"
    assert it["target"] == "reverse_kl_token_behaviour"
    assert it["on_policy"].keys() == it["off_policy"].keys() == {"target", "text"}
    assert it["formulas"]["coefficient"].startswith("c_t = w_t u_t")
    assert it["needs_behaviour"] is True
    assert it["needs_exact"] is False
    assert {"name", "value", "default", "meaning"} == it["options"][0].keys()
    assert {"reference", "topic"} == it["sources"][0].keys()
    assert "trl" in it["hosts"]


def test_a_biased_spec_exits_0_and_says_what_a_run_would_demand() -> None:
    result = run_cli("explain", "k1@loss")
    assert result.returncode == 0
    assert "unless /allow:biased is added" in words(result.stdout)
    assert "E[grad log policy] = 0" in words(result.stdout)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("k2@los", "loss"),
        ("helinger@loss", "hellinger"),
        ("k2@loss/si:token", "is"),
        ("k2@loss/is:tokn", "token"),
        ("k3", "k3@loss"),
        ("low_var_kl", "k3@loss"),
        ("mse", "k2@loss"),
        ("defualt", "default"),
    ],
)
def test_a_typo_names_the_nearest_word(text: str, nearest: str) -> None:
    result = run_cli("explain", text)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.rstrip().endswith(f"did you mean: {nearest}")
    assert "Traceback" not in result.stderr


def test_a_json_error_is_json() -> None:
    result = run_cli("explain", "k2@los", "--json")
    error = document(result)["error"]
    assert (result.returncode, result.stderr) == (2, "")
    assert {key: error[key] for key in ("text", "start", "end", "nearest")} == {
        "text": "k2@los",
        "start": 3,
        "end": 6,
        "nearest": "loss",
    }
    assert error["problem"] == "unknown placement 'los'"
    assert "advantage" in error["expected"]


@pytest.mark.parametrize("columns", ["30", "50", "80", "200"])
def test_lines_fit_the_terminal_and_carry_no_colour_into_a_pipe(columns: str) -> None:
    for arguments in (["explain", "k2@loss/horizon:sequence/is:decision/cap:2"], ["list"]):
        result = run_cli(*arguments, env={"COLUMNS": columns})
        lines = result.stdout.splitlines()
        assert "\x1b" not in result.stdout
        assert not [line for line in lines if line != line.rstrip()]
        # A formula or a spec is one word: it may stick out of 30 columns.
        assert not [line for line in lines if len(line) > int(columns) and len(line.split()) > 1]


def test_a_broken_estimator_package_is_named(register) -> None:
    env = register("kl_plugins.estimators", "mine = broken_rows:register", "raise ImportError('no such lib')")
    result = run_cli("explain", "mine@loss", env=env)
    assert result.returncode == 1
    assert "third-party-mine" in result.stderr
    assert "Traceback" not in result.stderr
    assert run_cli("explain", "k2@loss", env=env).returncode == 0


def test_a_registered_estimator_is_explained(register) -> None:
    source = (
        "from kl_plugins import register_estimator\n"
        "def register():\n"
        "    register_estimator('mine', value=lambda u, x: u, coefficient=lambda u, x: u, kind='reverse_kl')\n"
    )
    it = document(
        run_cli("explain", "mine@loss", "--json", env=register("kl_plugins.estimators", "mine = rows:register", source))
    )
    assert it["target"] == "reverse_kl_token"
    assert "user-defined" in it["formulas"]["value"]


def test_says_what_the_hosts_aggregation_does_to_the_target() -> None:
    it = document(run_cli("explain", "k2@loss", "--json"))
    assert "1/|y|" in it["aggregation"]["sequence mean"]
    assert "unchanged" in it["aggregation"]["token sum"]
    for host in ("trl", "verl", "openrlhf"):
        assert it["host_aggregation"][host]
    assert "short responses count more" in words(run_cli("explain", "k2@loss").stdout)


def test_explains_what_is_observed() -> None:
    result = run_cli("explain", "k3/observe:k2@loss/probe:50")
    assert (result.returncode, result.stderr) == (0, "")
    assert "observe changes nothing: the run trains with the framework's own KL (k3)" in words(result.stdout)
    assert "k2@loss is measured on the same tokens" in words(result.stdout)
    assert "Every 50 optimizer steps" in words(result.stdout)
    assert document(run_cli("explain", "k3/observe:k2@loss", "--json"))["spec"] == "k2@loss"


def test_observe_alone_sends_to_the_config() -> None:
    result = run_cli("explain", "observe")
    assert (result.returncode, result.stderr) == (0, "")
    assert "the spec that has the gradient of that KL is measured" in words(result.stdout)
    assert "kl-plugins explain --host" in words(result.stdout)
    assert len(document(run_cli("explain", "observe", "--json"))["notes"]) == 2
    assert run_cli("explain", "observe/probe").returncode == 2
