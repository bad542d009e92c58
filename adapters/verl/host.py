"""veRL's entry in the group ``kl_plugins.hosts``: strings only, so that the command line stays quick."""

from __future__ import annotations

from kl_plugins.hosts import Host

SUPPORTED = ">=0.8,<0.10"

LOSS_KEY = "actor_rollout_ref.actor.kl_loss_type"
SCORE_KEY = "algorithm.kl_penalty"
"""veRL's settings that hold a spec."""

LOSS_BETA = "actor_rollout_ref.actor.kl_loss_coef"
SCORE_BETA = "algorithm.kl_ctrl.kl_coef"
"""veRL's settings that hold beta."""

HOST = Host(
    name="verl",
    title="veRL",
    distribution="verl",
    packages=("verl",),
    supported=SUPPORTED,
    tested=("0.8.0", "0.9.0", "0.9.1"),
    keys={
        "loss": f"{LOSS_KEY}, with actor_rollout_ref.actor.use_kl_loss=True (beta: kl_loss_coef)",
        "reward": f"{SCORE_KEY}, with algorithm.use_kl_in_reward=True (beta: algorithm.kl_ctrl)",
        "advantage": f"{SCORE_KEY}, with algorithm.use_kl_in_reward=True (beta: algorithm.kl_ctrl)",
    },
    module="kl_plugins.adapters.verl",
    aggregation=(
        "by actor_rollout_ref.actor.loss_agg_mode: token-mean (the default): token mean; "
        "seq-mean-token-sum: token sum; seq-mean-token-sum-norm: constant; seq-mean-token-mean: sequence mean"
    ),
)
