"""``kl-plugins run``: the host is found by entry point, and its arguments reach it untouched."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import run_cli

# Plumbing only: a program that prints what it was given. Real hosts have tests of their own.
ECHO = """
import json
from kl_plugins.hosts import Host
HOST = Host("echo", "third-party-echo", ("echo_framework",), ">=3", ("3.2.1",), {}, "echo_host")
def run(module, argv):
    print(json.dumps([module, argv]))
    return 7
"""
UNTOUCHED = ["grpo", "--help", "--kl", "k2@loss/is:token", "--json", "--", "-h", "a b", "", "--version", "x=[1,2]"]


@pytest.fixture
def echo(register) -> dict[str, str]:
    return register("kl_plugins.hosts", "echo = echo_host:HOST", ECHO)


@pytest.mark.parametrize("module", ["echo", "echo_framework", "echo_framework.cli.train_ppo"])
def test_arguments_and_status_pass_through(echo, module: str) -> None:
    result = run_cli("run", module, *UNTOUCHED, env=echo)
    assert result.returncode == 7
    assert json.loads(result.stdout) == [module, UNTOUCHED]


@pytest.mark.parametrize("module", ["ecco", "other.echo", "echo_framework2.cli"])
def test_an_unknown_host_names_what_there_is(echo, module: str) -> None:
    result = run_cli("run", module, "--help", env=echo)
    assert (result.returncode, result.stdout) == (2, "")
    assert "echo (packages: echo_framework)" in result.stderr
    assert "trl (packages: trl)" in result.stderr
    assert "Traceback" not in result.stderr
    assert ("did you mean: echo" in result.stderr) is (module == "ecco")


def test_an_absent_host_says_how_to_install_it(register) -> None:
    source = ECHO.replace("third-party-echo", "never-published-anywhere")
    result = run_cli("run", "echo", env=register("kl_plugins.hosts", "echo = echo_host:HOST", source))
    assert result.returncode == 2
    assert 'pip install "never-published-anywhere>=3"' in result.stderr


def test_a_broken_adapter_is_named(register) -> None:
    source = ECHO.replace('"echo_host")', '"no_such_adapter")')
    result = run_cli("run", "echo", env=register("kl_plugins.hosts", "echo = echo_host:HOST", source))
    assert result.returncode == 1
    assert "no_such_adapter" in result.stderr
    assert "kl-plugins doctor" in result.stderr


def test_another_broken_package_does_not_stop_a_run(echo, tmp_path) -> None:
    other = tmp_path / "other_broken-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-broken\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[kl_plugins.hosts]\nbroken = no_such_module:HOST\n")
    assert run_cli("run", "echo", env=echo).returncode == 7
    assert "broken: entry point 'broken'" in run_cli("run", "nothing", env=echo).stderr


def test_a_bad_spec_in_a_run_gives_no_traceback(register) -> None:
    source = ECHO.replace("print(json.dumps([module, argv]))", "from kl_plugins import KLSpec; KLSpec.parse(argv[1])")
    env = register("kl_plugins.hosts", "echo = echo_host:HOST", source)
    result = run_cli("run", "echo", "--kl", "k2@los", env=env)
    assert result.returncode == 2
    assert "did you mean: loss" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_of_the_program_keeps_its_traceback(register) -> None:
    source = ECHO.replace("print(json.dumps([module, argv]))", "raise RuntimeError('out of memory')")
    result = run_cli("run", "echo", env=register("kl_plugins.hosts", "echo = echo_host:HOST", source))
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "out of memory" in result.stderr


def test_options_before_the_host_are_an_error(echo) -> None:
    result = run_cli("run", "--kl", "k2@loss", "echo", env=echo)
    assert result.returncode == 2
    assert "usage: kl-plugins" in result.stderr


def test_under_torchrun(register) -> None:
    env = register("kl_plugins.hosts", "echo = echo_host:HOST", ECHO.replace("return 7", "return 0"))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "kl_plugins", "run", "echo", "--kl"]
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('["echo", ["--kl"]]') == 2
