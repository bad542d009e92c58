"""The scripts of README and of the quickstart train as they are printed, on a small model."""

import pytest

from tests.support.guides import blocks

QUICK = 'output_dir="out", max_steps=1, use_cpu=True, bf16=False, save_strategy="no"'


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart/trl.md"])
def test_the_script_trains_under_its_spec(page, model, tmp_path, monkeypatch, capfd):
    script = next(code for code in blocks(page, "python") if "GRPOTrainer" in code)
    for printed, used in (("Qwen/Qwen2.5-0.5B-Instruct", model), ('output_dir="out"', QUICK)):
        assert script.count(printed) == 1
        script = script.replace(printed, used)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, page, "exec"), {"__name__": "__main__"})
    assert "kl-plugins: k2@loss/is:token/floor:0.5 active in TRL" in capfd.readouterr().err
