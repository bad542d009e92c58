"""OpenRLHF's entry in the group ``kl_plugins.hosts``: strings only, so that the command line stays quick."""

from __future__ import annotations

from kl_plugins.hosts import Host

SUPPORTED = ">=0.10.2,<=0.11.2"

ESTIMATOR_FLAG = "--algo.kl.estimator"
LOSS_FLAG = "--algo.kl.use_loss"
COEFFICIENT_FLAG = "--algo.kl.init_coef"

HOST = Host(
    name="openrlhf",
    title="OpenRLHF",
    distribution="openrlhf",
    packages=("openrlhf",),
    supported=SUPPORTED,
    tested=("0.11.2",),
    keys={
        "loss": f"{ESTIMATOR_FLAG}, with {LOSS_FLAG} (beta: {COEFFICIENT_FLAG})",
        "reward": f"{ESTIMATOR_FLAG}, without {LOSS_FLAG} (beta: {COEFFICIENT_FLAG})",
        "advantage": f"{ESTIMATOR_FLAG}, without {LOSS_FLAG} (beta: {COEFFICIENT_FLAG})",
    },
    module="kl_plugins.adapters.openrlhf",
    aggregation=(
        "@loss: token mean; @reward and @advantage by --actor.loss_agg_mode (token mean or sequence mean), and "
        "sequence mean under --actor.policy_loss_type gspo"
    ),
)
