"""``kl-plugins report`` reads what OpenRLHF's own TensorBoard logger writes."""

from types import SimpleNamespace

from openrlhf.utils.logging_utils import TensorboardLogger

from kl_plugins.report.reading import read_runs


def test_the_event_files_of_openrlhfs_logger(tmp_path):
    wandb = SimpleNamespace(run_name="my-run")
    logger = TensorboardLogger(SimpleNamespace(logger=SimpleNamespace(tensorboard_dir=str(tmp_path), wandb=wandb)))
    status = {"reward": 0.5, "kl": 0.1, "logprobs_diff": 0.1, "policy_loss": 1.0, "actor_grad_norm": 2.0, "ppo_kl": 0.0}
    for step in (1, 2):
        logger.log_train(step, {**status, "kl/value": 0.2, "generated_samples": ("text", 0.5)})
    logger.log_eval(2, {"eval_score": 0.25})
    logger.close()
    (run,) = read_runs([str(tmp_path)])
    assert (run.name, run.logs.title, run.active, run.steps()) == ("my-run", "OpenRLHF", True, (1, 2))
    assert run.of_role("kl") == ["kl"]
    assert run.series["kl/value"].steps == (1, 2)
    assert "eval/eval_score" in run.series
