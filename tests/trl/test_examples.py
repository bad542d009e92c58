"""The examples in docs/examples which a user copies, run as they stand in processes of their own, at a tiny size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trl.launch import LIMIT, ROOT

EXAMPLES = ROOT / "docs" / "examples"
SPEC = "k2@loss/is:token/floor:0.5"
RECEIPT = f"kl-plugins: {SPEC} active in TRL"
TINY = {"STEPS": "2", "PROMPTS": "2", "GENERATIONS": "2", "LENGTH": "8"}


def execute(command: list, folder: Path, **variables: str) -> str:
    """Run a command of an example in a folder; give back what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env={**os.environ, "PATH": path, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def active_steps(output: str) -> int:
    """Training steps that were logged with the regulariser in them."""
    return len(re.findall(r"'kl/active': '?1", output))


def test_script(model, tmp_path):
    output = execute(["python", EXAMPLES / "trl" / "grpo.py"], tmp_path, MODEL=model, OUT=str(tmp_path / "out"), **TINY)
    assert RECEIPT in output
    assert active_steps(output) == 2
    assert re.search(r"'kl/value': \d.*'kl/beta': 0\.04.*'kl/ess': (0\.\d|1)", output), output[-2000:]
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.full
def test_script_under_another_spec(model, tmp_path):
    script, changes = EXAMPLES / "trl" / "grpo.py", {"KL": "k1@advantage", "BETA": "0.01", **TINY}
    output = execute(["python", script], tmp_path, MODEL=model, OUT=str(tmp_path / "out"), **changes)
    assert "kl-plugins: k1@advantage active in TRL" in output
    assert active_steps(output) == 2


def test_file_for_the_command_line(model, tmp_path):
    execute(["python", EXAMPLES / "data.py", "--out", tmp_path / "data", "--rows", "32"], tmp_path)
    # The command is given in the example's own folder, where the reward function is. YAML has no variables: what stands
    # on the command line wins over the file.
    small = ["--max_steps", 2, "--num_generations", 2, "--per_device_train_batch_size", 4, "--max_completion_length", 8]
    here = [
        "--model_name_or_path",
        model,
        "--dataset_name",
        tmp_path / "data" / "trl",
        "--output_dir",
        tmp_path / "out",
    ]
    command = ["kl-plugins", "run", "trl", "grpo", "--config", "grpo.yaml", *here, *small, "--bf16", "false"]
    output = execute(command, EXAMPLES / "trl")
    assert RECEIPT in output
    assert active_steps(output) == 2
    assert (tmp_path / "out" / "config.json").exists()


def test_notebook(model, tmp_path):
    notebook = json.loads((EXAMPLES / "trl.ipynb").read_text(encoding="utf-8"))
    program = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # What a notebook shows of a cell's last line, a program has to print.
    program[-1] = re.sub(r"^(log\[.*)$", r"print(\1.to_string())", program[-1], flags=re.MULTILINE)
    (tmp_path / "cells.py").write_text("\n\n".join(program))
    output = execute(["python", "cells.py"], tmp_path, MODEL=model, OUT=str(tmp_path / "out"), **TINY)
    assert f"{SPEC} -> reverse_kl_token_behaviour" in output
    assert "did you mean" in output
    assert RECEIPT in output
    assert active_steps(output) == 2
    assert re.search(r"step +reward +kl/value +kl/beta +kl/ess\n0 +1 .*\n1 +2 ", output), output[-2000:]


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads((EXAMPLES / "trl.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
