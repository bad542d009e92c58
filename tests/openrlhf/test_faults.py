"""What goes wrong on one of several workers, or in the program itself, stops the run and says where."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import openrlhf
import pytest
import ray
import torch

from kl_plugins.receipts import MissingReceiptError
from tests.support.openrlhf import remote
from tests.support.openrlhf.cli import DEFAULTS, MODULE
from tests.support.openrlhf.contract_driver import by_rank, recorded
from tests.support.openrlhf.harness import LOSS
from tests.support.openrlhf.ray_support import ENVIRONMENT

SPEC = "k2@loss/is:token"
SAMPLER = f"{SPEC}/behaviour:sampler"
# Two ranks take half of the rollouts each.
EACH = ("--train.batch_size", "8", "--train.micro_batch_size", "2")


def test_every_rank_gives_a_receipt(pair):
    receipts = pair.receipts(pair.start((*LOSS, SPEC, *EACH)))
    assert [receipt.rank for receipt in receipts] == [0, 1]
    assert len({receipt.pid for receipt in receipts} | {os.getpid()}) == 3


def test_two_ranks_train_as_one(pair, harness, rollouts):
    flags = (*LOSS, f"{SAMPLER}/cap:1.2", *EACH, "--train.max_epochs", "1")
    one, two = (where.run(flags, rollouts) for where in (harness, pair))
    gap = sum((two.gradient[name] - values).square().sum() for name, values in one.gradient.items())
    # bfloat16 gradients, accumulated in another order
    assert (gap / sum(values.square().sum() for values in one.gradient.values())).sqrt() < 0.02
    for key in ("kl/value", "kl/weight/max", "kl/cap_frac", "kl/reverse_k1"):
        assert two.metrics[-1][key] == pytest.approx(one.metrics[-1][key], rel=0.02, abs=1e-3), key


@pytest.mark.parametrize(
    ("whose", "field", "spec"),
    [
        ("sampler", "rollout_log_probs", SAMPLER),
        ("reference", "base_action_log_probs", SPEC),
        ("old policy", "action_log_probs", f"{SPEC}/behaviour:old"),
    ],
)
def test_what_one_worker_alone_finds_stops_both(pair, rollouts, whose, field, spec):
    # A trainer that is not OpenRLHF's own may give its workers what OpenRLHF's experience maker would refuse.
    trainer = pair.start((*LOSS, spec, *EACH))
    pair.receipts(trainer)
    make = trainer.experience_maker.make_experience_batch

    def spoilt(samples):
        made = make(samples)
        values = getattr(made[-1], field).clone()
        values[-1, int(made[-1].action_mask[-1].nonzero()[1])] = math.nan
        setattr(made[-1], field, values)
        return made

    trainer.experience_maker.make_experience_batch = spoilt
    with recorded(pair) as fits, pytest.raises(ray.exceptions.RayTaskError):
        trainer.train_step(rollouts.experiences(), 0)
    first, second = by_rank(fits)
    assert first == second
    assert f"the log-probs of the {whose} on 1 of 43 response tokens are not finite" in first


def test_empty_masks_on_one_rank_leave_the_others(pair, rollouts):
    result = pair.run((*LOSS, SPEC, *EACH), rollouts.with_empty_mask(4, 5, 6, 7))
    full = pair.run((*LOSS, SPEC, *EACH), rollouts)
    assert result.metrics[-1].keys() == full.metrics[-1].keys()
    assert all(math.isfinite(value) for key, value in result.metrics[-1].items() if key.startswith("kl/"))
    assert all(torch.isfinite(values).all() for values in result.parameters.values())
    assert result.metrics[-1]["kl/active"] == 1


def test_a_dead_worker_is_named(pair):
    trainer = pair.start((*LOSS, SPEC, *EACH))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pair.policy._actor_handlers[1].__ray_call__.remote(remote.end))
    with pytest.raises(MissingReceiptError, match=r"no receipt from 1 of 2 workers:\s+rank 1: Actor\w*Error"):
        pair.receipts(trainer)
    pair.end()


def program(assets, folder, *flags):
    """The launching process of the real program, which must end before Ray starts."""
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{folder}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
    words = [str(word) for pair in DEFAULTS.items() for word in pair]
    paths = ["--actor.model_name_or_path", assets / "model", "--reward.remote_url", assets / "reward.py"]
    command = [sys.executable, "-W", "ignore", "-m", "kl_plugins", "run", MODULE, *words, *map(str, paths), *flags]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode != 0
    assert "Ray instance" not in result.stderr + result.stdout
    return result.stderr


def test_a_tampered_source_ends_the_program_before_ray_starts(assets, tmp_path):
    copy = tmp_path / "openrlhf"
    shutil.copytree(Path(openrlhf.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    maker = copy / "trainer" / "ppo_utils" / "experience_maker.py"
    text = maker.read_text()
    assert "samples.kl = kl\n" in text
    maker.write_text(text.replace("samples.kl = kl\n", "samples.kl = 2 * kl\n"))
    error = program(assets, tmp_path, "--algo.kl.estimator", "k1@reward")
    assert "RemoteExperienceMaker.make_experience of openrlhf" in error
    assert "is not the code that kl-plugins was checked with" in error


def test_an_unknown_version_ends_the_program_before_ray_starts(assets, tmp_path):
    info = tmp_path / "openrlhf-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openrlhf\nVersion: 0.99.0\n")
    error = program(assets, tmp_path, *LOSS, SPEC)
    assert "openrlhf 0.99.0 is not among the versions that were checked" in error


def test_a_launcher_without_the_package_knows_no_such_estimator(assets, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", MODULE, "--algo.kl.estimator", SPEC]
    variables = {**os.environ, **ENVIRONMENT}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 2
    assert f"invalid choice: '{SPEC}'" in result.stderr
