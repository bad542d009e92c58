"""Two processes over gloo: equality with stock TRL, metrics, receipts, and a process without the hooks."""

import json
from typing import Any

import pytest

from tests.support.trl.launch import torchrun


def results(scenario: str, model: str, folder: Any, **environment: str) -> tuple[list[Any], str]:
    done = torchrun("tests.support.trl.worker", scenario, model, str(folder), **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], done.stdout


def test_null_is_stock(model, tmp_path):
    ranks, output = results("stock", model, tmp_path)
    for found in ranks:
        for lora in (False, True):
            stock = found[f"stock {lora}"]
            assert stock["log"]["grad_norm"][0] > 0
            assert found[f"subclass {lora}"] == stock
            assert found[f"attached {lora}"] == stock
    assert "kl-plugins:" not in output


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    return results("train", model, tmp_path_factory.mktemp("train"))


def test_ranks_agree(trained):
    (first, second), _ = trained
    for name in first.keys() - {"reordered"}:
        assert first[name]["weights"] == second[name]["weights"], name
        assert {k: v for k, v in first[name]["log"].items() if k.startswith("kl")} == {
            k: v for k, v in second[name]["log"].items() if k.startswith("kl")
        }


def test_numbers_of_other_tokens_on_one_rank_stop_both(trained):
    (first, second), _ = trained
    assert "most probable tokens differ from TRL's own by" in first["reordered"]["error"]
    assert first["reordered"] == second["reordered"]


def test_controller_moves_alike(trained):
    (first, _), _ = trained
    betas = first["k2@loss/is:token/beta:adaptive-0.001-64"]["log"]["kl/beta"]
    # Reference and policy start equal, so the first error is -0.2; 8 sequences of both ranks in a horizon of 64.
    assert betas[:2] == pytest.approx([0.2, 0.2 * (1 - 0.2 * 8 / 64)])
    assert len(set(betas)) == 3


def test_kl_in_the_reward_is_gathered(trained):
    (first, _), _ = trained
    for key in ("loss", "grad_norm", "reward", "kl"):
        assert first["RLOO"]["log"][key] == pytest.approx(first["RLOO stock"]["log"][key], rel=1e-4, abs=2e-6)


def test_every_process_leaves_a_receipt_once(trained):
    _, output = trained
    for rank in (0, 1):
        lines = [
            line for line in output.splitlines() if f"rank {rank} of 2" in line and "k1@advantage active in TRL" in line
        ]
        assert len(lines) == 1, output[-3000:]


@pytest.mark.parametrize(
    ("scenario", "expected"), [("missing", "no receipt from rank 1 of 2"), ("unequal", "disagree on spec")]
)
def test_a_process_without_the_named_regulariser_stops_the_run(scenario, expected, model, tmp_path):
    done = torchrun("tests.support.trl.worker", scenario, model, str(tmp_path), KL_PLUGINS_RECEIPT_TIMEOUT="5")
    assert done.returncode != 0
    assert "MissingReceiptError" in done.stdout
    assert expected in done.stdout
    assert not (tmp_path / "0.json").exists(), "rank 0 must not have trained"
