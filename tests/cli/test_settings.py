"""Reading settings: one result for the same settings in every format, with the place of each, and clear errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kl_plugins.settings import Format, Settings, Unknown, UnreadableError, read_text, read_words

FORM = Format(program=r"\btrain_it\b", calls=("TrainConfig",), config_flags=("config",))


def values(settings: Settings) -> dict[str, Any]:
    return {setting.key: setting.value for setting in settings}


WANTED = {"beta": 0.04, "loss": "grpo", "steps": 2, "kl.on": True, "top_p": None, "big": 1e-3}
SAME = {
    "a.yaml": "beta: 0.04\nloss: 'grpo'\nsteps: 2\nkl:\n  on: true\ntop_p:\nbig: 1e-3\n",
    "a.json": json.dumps({"beta": 0.04, "loss": "grpo", "steps": 2, "kl": {"on": True}, "top_p": None, "big": 1e-3}),
    "a.py": "b = 0.04\nTrainConfig(beta=b, loss='grpo', steps=2, kl={'on': True}, top_p=None, big=1e-3)\nf(beta=9)\n",
    "a.sh": "#!/bin/bash\nset -x\nB=0.04\npip install it --beta 9\n"
    'python -m train_it --beta $B \\\n  --loss=grpo --steps 2 --kl.on --top_p null \\\n  --big 1e-3 "$@"\n',
    "hydra.sh": 'LOSS=${LOSS:-grpo}\nARGS=(\n  beta=0.04 # the coefficient\n  loss="$LOSS"\n  steps=2\n)\n'
    'train_it "${ARGS[@]}" +kl.on=True ++top_p=null ~gone=1 big=1e-3\n',
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_settings(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(SAME[name])
    assert values(read_words([str(path)], FORM)) == WANTED


def test_a_notebook_is_read_without_its_own_commands(tmp_path: Path) -> None:
    source = ["!pip install it\n", "if True:\n", "    %env A=1\n", "TrainConfig(beta=0.1)\n"]
    cells = [{"cell_type": "markdown", "source": ["beta: 3"]}, {"cell_type": "code", "source": source}]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert values(read_words([str(path)], FORM)) == {"beta": 0.1}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ["--beta", "0.1", "--flag", "--list", "1", "2", "--on=no"],
            {"beta": 0.1, "flag": True, "list": [1, 2], "on": "no"},
        ),
        (["train_it --beta 0.1 --top_k -1"], {"beta": 0.1, "top_k": -1}),
        (["TrainConfig(beta=0.1)"], {"beta": 0.1}),
        (["a.b=[x,y]", "c={d: 1}"], {"a.b": ["x", "y"], "c": "{d: 1}"}),
        (["beta=1", "beta=2"], {"beta": 2}),
        (
            ["a.b=3", "c=${a.b}", "d=${oc.select:no.such,7}", "e=${oc.env:HOME}"],
            {"a.b": 3, "c": 3, "d": 7, "e": Unknown("${oc.env:HOME}")},
        ),
    ],
)
def test_words_of_a_command_line(words: list[str], wanted: dict[str, Any]) -> None:
    assert values(read_words(words, FORM)) == wanted


def test_places_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.sh"
    path.write_text(SAME["a.sh"])
    found = read_words([str(path), "beta=1"], FORM)
    places = {setting.key: setting.place for setting in found}
    assert (places["steps"], places["big"], places["beta"]) == (f"{path}:6", f"{path}:7", "command line")
    yaml = tmp_path / "a.yaml"
    yaml.write_text(SAME["a.yaml"])
    place = read_words([str(yaml)], FORM).get("kl.on")
    assert place is not None
    assert place.place == f"{yaml}:5"


def test_a_config_flag_is_read_below_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("beta: 0.5\nloss: dapo\n")
    script = tmp_path / "run.sh"
    script.write_text("train_it --beta 0.1 --config base.yaml\n")
    assert values(read_words([str(script)], FORM)) == {"beta": 0.1, "loss": "dapo", "config": "base.yaml"}
    script.write_text("train_it --config gone.yaml\n")
    assert "gone.yaml" in read_words([str(script)], FORM).notes[0]


def test_commands_of_other_programs_are_left_out_and_the_last_one_counts() -> None:
    text = "other --beta 3\ntrain_it --beta 1\ntrain_it --beta 2; other --beta 4\n"
    found = read_text(text, "a.sh", FORM, ".sh")
    assert values(found) == {"beta": 2}
    assert "2 training commands" in found.notes[0]


def test_a_comment_between_continued_lines_ends_the_command_as_in_the_shell() -> None:
    found = read_text("train_it --beta 1 \\\n# --loss dapo \\\n--steps 2\n", "a.sh", FORM, ".sh")
    assert values(found) == {"beta": 1}
    assert "--steps" in found.notes[0]


def test_a_command_in_quotes_and_in_a_here_document_is_found() -> None:
    quoted = 'ray job submit -- bash -c "train_it \\\n --beta 1 \\\n --loss dapo"\n'
    assert values(read_text(quoted, "a.sh", FORM, ".sh")) == {"beta": 1, "loss": "dapo"}
    here = "read -r -d '' COMMAND <<EOF\ntrain_it --beta 1 \\\n  --loss dapo\nEOF\npython $COMMAND\n"
    assert values(read_text(here, "a.sh", FORM, ".sh")) == {"beta": 1, "loss": "dapo"}


def test_arithmetic_and_the_defaults_of_arguments_are_known() -> None:
    text = "N=$((1024 * 2 - 8))\nM=${2:-dapo}\ntrain_it --steps $((N + 4 / 2)) --loss $M --beta $((X + 1))\n"
    found = read_text(text, "a.sh", FORM, ".sh")
    assert {s.key: s.value for s in found if s.key in ("steps", "loss")} == {"steps": 2042, "loss": "dapo"}
    assert isinstance(values(found)["beta"], Unknown)


def test_a_value_that_is_set_elsewhere_is_unknown() -> None:
    assert values(read_text("train_it --beta $BETA", "a.sh", FORM, ".sh")) == {"beta": Unknown("$BETA")}
    assert values(read_text("TrainConfig(beta=args.beta)", "a.py", FORM, ".py")) == {"beta": Unknown("args.beta")}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.yaml", "a: [1", "not YAML"),
        ("a.yaml", "[[1], 2]", "neither a mapping"),
        ("a.py", "def (", "invalid syntax"),
        ("a.ipynb", "{}", "not a notebook"),
        ("a.sh", b"\xff\xfe".decode("latin-1"), ""),
    ],
)
def test_unreadable_files_are_named(name: str, text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UnreadableError) as error:
        read_words([str(path)], FORM)
    assert str(path) in str(error.value)
    assert problem in str(error.value)


def test_a_missing_file_is_named_and_a_missing_parser_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableError, match=r"none\.yaml"):
        read_words(["none.yaml"], FORM)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UnreadableError, match="pip install pyyaml"):
        read_text("beta: 1\n", "a.yaml", FORM, ".yaml")
    with pytest.raises(UnreadableError, match="pip install pyyaml"):
        read_text("beta: 1\n", "standard input", FORM)


@pytest.mark.parametrize("text", ["beta: 0.1\n", "train_it --beta 0.1", "beta=0.1", "TrainConfig(\n    beta=0.1,\n)\n"])
def test_standard_input_may_have_any_format(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert values(read_words(["-"], FORM)) == {"beta": 0.1}


def test_a_list_of_hydras_overrides_is_read(tmp_path: Path) -> None:
    path = tmp_path / "overrides.yaml"
    path.write_text("- beta=0.1\n- +kl.on=True\n")
    found = read_words([str(path)], FORM)
    assert values(found) == {"beta": 0.1, "kl.on": True}
    assert [setting.place for setting in found] == [f"{path}:1", f"{path}:2"]
