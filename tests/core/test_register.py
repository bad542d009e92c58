"""A new estimator is one registered row: by a call, or by another package's entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kl_plugins import KLSpec, KLSpecError, estimators, kl_penalty, kl_term, register_estimator

MASK = torch.tensor([[True, True, False]])
LOGP = torch.tensor([[-1.0, -2.0, float("nan")]], dtype=torch.float64)
REF = torch.tensor([[-1.5, -1.0, 0.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    before = dict(estimators._TABLE)
    yield
    estimators._TABLE.clear()
    estimators._TABLE.update(before)


def test_from_f_alone() -> None:
    with pytest.raises(KLSpecError, match="unknown estimator"):
        KLSpec.parse("triangle@loss")
    row = register_estimator("triangle", f=lambda d: (d - 1) ** 2 / (d + 1))
    spec = KLSpec.parse("triangle@loss/horizon:sequence")
    assert (row.kind, spec.target, spec.future) == ("other_f", "other_f_sequence", "own")
    assert str(spec) == "triangle@loss/horizon:sequence"
    term = kl_term(spec, LOGP, REF, MASK)
    delta = (REF - LOGP)[:, :2].exp()
    value = (delta - 1) ** 2 / (delta + 1)
    own = value - delta * (delta - 1) * (delta + 3) / (delta + 1) ** 2
    torch.testing.assert_close(term.value[:, :2], value)
    torch.testing.assert_close(term.coefficient[:, :2], own + torch.tensor([[value[0, 1], 0.0]]))
    assert term.value[0, 2] == 0


def test_from_value_and_coefficient() -> None:
    register_estimator("cubic", value=lambda u, x: u**3, coefficient=lambda u, x: 3 * u**2, value_formula="u^3")
    with pytest.raises(KLSpecError, match="no divergence"):
        KLSpec.parse("cubic@reward")
    spec = KLSpec.parse("cubic@reward/allow:biased")
    assert kl_penalty(spec, LOGP, REF, MASK).tolist() == [[0.125, -1.0, 0.0]]
    with pytest.raises(KLSpecError, match="f-divergences"):
        KLSpec.parse("cubic@loss/horizon:sequence/future:own/allow:biased")


def test_a_kind_says_the_target() -> None:
    register_estimator("mine", value=lambda u, x: u, coefficient=lambda u, x: u, kind="reverse_kl")
    assert KLSpec.parse("mine@loss/is:token").target == "reverse_kl_token_behaviour"


@pytest.mark.parametrize("name", ["", "K2", "2k", "a@b", "a/b", "a:b", "a b", "-a", "alpha-2", "alpha-x", "ä", "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="must match"):
        register_estimator(name, f=lambda d: d)


@pytest.mark.parametrize("name", ["k2", "k3+", "exact", "jsd"])
def test_taken_names(name: str) -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_estimator(name, f=lambda d: d)


def test_one_definition_is_enough() -> None:
    def two(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return u

    with pytest.raises(ValueError, match="not both"):
        register_estimator("mine", f=lambda d: d, value=two)
    with pytest.raises(ValueError, match="give f"):
        register_estimator("mine")
    with pytest.raises(ValueError, match="both value and coefficient"):
        register_estimator("mine", value=two)
    with pytest.raises(ValueError, match="kind 'reverse' is none of"):
        register_estimator("mine", value=two, coefficient=two, kind="reverse")  # type: ignore[arg-type]
    with pytest.raises(KLSpecError):
        KLSpec.parse("mine@loss")


def test_a_spec_whose_row_is_not_here_says_so() -> None:
    register_estimator("elsewhere", f=lambda d: (d - 1) ** 2)
    spec = KLSpec.parse("elsewhere@loss")
    del estimators._TABLE["elsewhere"]
    with pytest.raises(LookupError, match="'elsewhere' is not registered in this process"):
        kl_term(spec, LOGP, REF, MASK)


def install(folder: Path, code: str) -> None:
    """Another package, as pip would leave it: a module and its dist-info."""
    info = folder / "their_kl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kl\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kl_plugins.estimators]\ntheirs = their_kl:register\n")
    (folder / "their_kl.py").write_text(code)


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_an_entry_point_adds_a_word(tmp_path: Path) -> None:
    install(
        tmp_path,
        "from kl_plugins import register_estimator\n"
        "def register():\n    register_estimator('theirs', f=lambda d: (d - 1) ** 2, source='their paper')\n",
    )
    done = python(
        tmp_path,
        "import sys; from kl_plugins import KLSpec, KLSpecError\n"
        "print(KLSpec.parse('theirs@loss/is:token').target)\n"
        "try: KLSpec.parse('thiers@loss')\n"
        "except KLSpecError as error: print(error.nearest)\n"
        "print('torch' in sys.modules)\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["other_f_token_behaviour", "theirs", "False"]


def test_a_broken_entry_point_is_named_and_stops_only_what_needs_it(tmp_path: Path) -> None:
    install(tmp_path, "def register():\n    raise OSError('no such thing')\n")
    code = "from kl_plugins import KLSpec; print(KLSpec.parse('k2@loss')); KLSpec.parse('theirs@loss')"
    done = python(tmp_path, code)
    assert done.stdout.split() == ["k2@loss"]
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in ("theirs", "their_kl:register", "'their-kl'", "OSError", "no such thing"))
