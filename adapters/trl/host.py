"""TRL's entry in the group ``kl_plugins.hosts``: strings only, so that the command line stays quick."""

from __future__ import annotations

from kl_plugins.hosts import Host

SUPPORTED = ">=0.28,<1.17"

HOST = Host(
    name="trl",
    title="TRL",
    distribution="trl",
    packages=("trl",),
    supported=SUPPORTED,
    tested=("0.28.0", "1.0.0", "1.16.0"),
    keys={
        "loss": "kl in GRPOConfig, kl: in YAML, --kl on the command line; with beta > 0",
        "reward": "kl in GRPOConfig or RLOOConfig; with beta > 0",
        "advantage": "kl in GRPOConfig or RLOOConfig; with beta > 0",
    },
    module="kl_plugins.adapters.trl",
    aggregation=(
        "GRPO by loss_type: dapo (the default), bnpo, cispo, vespo: token mean; grpo, sapo: sequence mean; "
        "dr_grpo: constant; luspo: token sum. RLOO: token sum"
    ),
)
