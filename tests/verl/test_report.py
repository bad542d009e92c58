"""``kl-plugins report`` reads what veRL's own file logger writes."""

import math

from verl.utils.tracking import FileLogger

from kl_plugins.report.reading import read_runs


def test_the_file_of_verls_logger(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    logger = FileLogger("project", "experiment")
    common = {"actor/kl_loss": 0.1, "actor/kl_coef": 0.001, "critic/score/mean": 0.5, "actor/grad_norm": 1.0}
    logger.log({**common, "kl/value": 0.2}, step=1)
    logger.log({**common, "kl/value": math.nan}, step=2)  # veRL writes null
    logger.finish()
    (run,) = read_runs([str(path)])
    assert (run.kind, run.logs.title, run.active, run.steps()) == ("veRL's file logger", "veRL", True, (1, 2))
    assert run.of_role("kl") == ["actor/kl_loss"]
    assert run.of_role("beta") == ["actor/kl_coef"]
    first, second = run.series["kl/value"].values
    assert first == 0.2
    assert math.isnan(second)
