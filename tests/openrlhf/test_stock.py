"""Installed and attached, but without a spec: OpenRLHF trains as it does without kl-plugins, bit by bit."""

import pytest
import torch

from tests.support.openrlhf import remote
from tests.support.openrlhf.harness import STOCK

TIMES = "timing/"


@pytest.mark.parametrize("name", STOCK)
def test_an_unused_plugin_changes_no_bit(name, harness, rollouts, stock):
    ours, theirs = harness.run(STOCK[name], rollouts), stock[name]
    assert ours.parameters.keys() == theirs["parameters"].keys() != set()
    for parameter, values in theirs["parameters"].items():
        assert torch.equal(ours.parameters[parameter], values), parameter
    for mine, other in zip(ours.metrics, theirs["metrics"], strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            assert key.startswith(TIMES) or mine[key] == other[key], key


def test_the_hooks_were_in_the_workers_of_these_runs(harness):
    assert "kl_plugins.patches.openrlhf.worker" in harness.ask(remote.imported)[0]


def test_the_settings_differ_from_one_another(stock):
    runs = [torch.cat([values.flatten() for values in result["parameters"].values()]) for result in stock.values()]
    distinct = {run.numpy().tobytes() for run in runs}
    assert len(distinct) == len(STOCK) - 1  # with an unbiased gradient the estimator sets the logged value alone
