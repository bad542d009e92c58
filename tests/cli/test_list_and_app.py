"""``kl-plugins list``, the version, the help, and what is not imported."""

import subprocess
import sys

import pytest

import kl_plugins
from kl_plugins.estimators import BUILT_IN
from kl_plugins.spec import PRESETS

from .conftest import document, run_cli


def test_list_shows_every_word() -> None:
    found = document(run_cli("list", "--json"))
    assert found.keys() == {"estimators", "placements", "presets", "corrections", "options", "beta", "hosts"}
    assert [row["name"] for row in found["estimators"]] == [*BUILT_IN, "alpha-<a>"]
    assert {row["name"]: row["spec"] for row in found["presets"]} == PRESETS
    assert all(row["note"] and row["target"] for row in found["presets"])
    trl = next(row for row in found["hosts"] if row["name"] == "trl")
    assert trl["tested"]
    assert trl["supported"]
    assert trl["error"] is None
    text = run_cli("list").stdout
    assert all(row["name"] in text for section in found.values() for row in section)


def test_list_shows_a_broken_host(register) -> None:
    env = register("kl_plugins.hosts", "broken = broken_host:HOST", "raise RuntimeError('half installed')")
    found = document(run_cli("list", "--json", env=env))["hosts"]
    assert {row["name"] for row in found} >= {"trl", "broken"}
    assert "half installed" in next(row for row in found if row["name"] == "broken")["error"]


def test_version() -> None:
    result = run_cli("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"kl-plugins {kl_plugins.__version__}")


def test_help_names_every_command() -> None:
    result = run_cli("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("explain", "list", "doctor", "run"))
    for command in ("explain", "list", "doctor", "run"):
        assert run_cli(command, "--help").returncode == 0


@pytest.mark.parametrize("arguments", [(), ("explian",), ("explain",), ("explain", "k2@loss", "--jsn"), ("run",)])
def test_usage_errors_exit_2_without_traceback(arguments: tuple[str, ...]) -> None:
    result = run_cli(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: kl-plugins" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "k3@loss"),
        ("explain", "k3@los"),
        ("list",),
        ("run", "nothing.like.it", "--kl", "k2@loss"),
        ("--help",),
    ],
)
def test_torch_and_hosts_are_not_imported(arguments: tuple[str, ...]) -> None:
    script = (
        "import sys\n"
        "from kl_plugins.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "slow = {'torch', 'numpy', 'trl', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
