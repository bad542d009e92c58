"""The claims, each with the test that decides it.

The thresholds were fixed before the runs. Do not change a threshold after results are known.

Sources: arXiv 2510.01555 (KL as gradient optimisation), arXiv 2512.21852 (A Comedy of Estimators). Both train large
models. These tests check whether the effect exists in small models, where everything can be measured exactly.
"""

from __future__ import annotations

from math import log

from .verdicts import Claim, Point

NONE = Point("none")
K1_LOSS = Point("k1@loss/allow:biased")
K2 = Point("k2@loss")
K3 = Point("k3@loss")
K1_REWARD = Point("k1@reward")
K3_REWARD = Point("k3@reward/allow:biased")
K1_ADVANTAGE = Point("k1@advantage")
EXACT = Point("exact@loss")
NAIVE, CORRECTED, CAPPED = "k2@loss", "k2@loss/is:token", "k2@loss/is:token/cap:2"
FAR, NEAR = 16, 1

GRADIENT, COMEDY, OWN = "arXiv 2510.01555", "arXiv 2512.21852", "theory"
ALL = ("rare", "common", "sums")
LIKE, HELD, MARGIN = log(1.25), log(0.5), 0.02
"""Thresholds.

They are the log-ratio of KLs that count as alike, the log-ratio of a KL that counts as held, and the smallest
difference of objectives that matters.
"""


def _at(arm: str, delay: int = 0, precision: str = "fp32") -> Point:
    return Point(arm, delay, precision)


CLAIMS = (
    Claim("drift", "control", "without a regulariser the policy leaves the reference far behind k2's KL",
          ALL, "kl", (NONE,), (K2,), "above", log(1.5), log=True),
    Claim("k1-loss-like-none", GRADIENT, "k1 as a loss ends at the same KL as no KL at all",
          ALL, "kl", (K1_LOSS,), (NONE,), "within", LIKE, log=True),
    Claim("k3-reward-unheld", COMEDY, "k3 in the reward does not hold the policy: its KL is that of no KL, or beyond",
          ALL, "kl", (K3_REWARD,), (NONE,), "above", log(0.8), log=True),
    Claim("k3-reward-collapse", COMEDY, "k3 in the reward collapses: it ends with far less reward than k1 there",
          ALL, "reward", (K3_REWARD,), (K1_REWARD,), "below", -0.1),
    Claim("k1-reward-stable", COMEDY, "k1 in the reward holds: at most half the KL of no KL",
          ALL, "kl", (K1_REWARD,), (NONE,), "below", HELD, log=True),
    Claim("k1-advantage-stable", COMEDY, "k1 in the advantage, the same gradient, holds as well",
          ALL, "kl", (K1_ADVANTAGE,), (NONE,), "below", HELD, log=True),
    Claim("k1-reward-best", COMEDY, "k1 in the reward ends with more E[R] - beta KL than k3 as a loss",
          ALL, "objective", (K1_REWARD,), (K3,), "above", 0.0),
    Claim("k2-holds", GRADIENT, "k2 as a loss regularises: at most half the KL of no KL",
          ALL, "kl", (K2,), (NONE,), "below", HELD, log=True),
    Claim("k3-holds", GRADIENT, "k3 as a loss regularises: at most half the KL of no KL",
          ALL, "kl", (K3,), (NONE,), "below", HELD, log=True),
    Claim("k3-looser-rare", GRADIENT, "where the reward is rare under the reference, k3 as a loss holds more loosely "
          "than k2", ("rare",), "kl", (K3,), (K2,), "above", log(1.1), log=True),
    Claim("k3-tighter-common", OWN, "where it is common, the order turns round", ("common",), "kl",
          (K3,), (K2,), "below", -log(1.1), log=True),
    Claim("k2-entropy", GRADIENT, "k2 as a loss keeps slightly more entropy than k3 (rare reward)",
          ("rare",), "entropy", (K2,), (K3,), "above", 0.0),
    Claim("k2-steadier", GRADIENT, "the reward moves more steadily under k2 than under k3 (rare reward)",
          ("rare",), "reward roughness", (K2,), (K3,), "below", 0.0, log=True),
    Claim("exact-same-end", OWN, "exact and sampled KL have one gradient in the mean, and end at one objective",
          ("rare", "common"), "objective", (EXACT,), (K2,), "within", MARGIN),
    Claim("exact-steadier", OWN, "without sampling noise the KL moves more steadily",
          ("rare", "common"), "kl roughness", (EXACT,), (K2,), "below", 0.0, log=True),
    Claim("stale-none", COMEDY, "without KL, data 16 updates old end with less reward than fresh data",
          ("rare",), "reward", (_at("none", FAR),), (NONE,), "below", -0.05),
    Claim("stale-k1-loss", COMEDY, "k1 as a loss is no better than no KL on data 16 updates old",
          ("rare",), "objective", (_at(K1_LOSS.arm, FAR),), (_at("none", FAR),), "below", MARGIN),
    Claim("stale-k1-score", COMEDY, "on data 16 updates old, k1 as a score ends with at least the E[R] - beta KL of k3 "
          "as a loss", ("rare",), "objective", (_at("k1@advantage", FAR),), (_at("k3@loss", FAR),), "above", -MARGIN),
    Claim("stale-naive-worse", GRADIENT, "on data 16 updates old, k2 without an importance weight ends with less "
          "E[R] - beta KL than with one", ("rare", "common"), "objective", (_at(CORRECTED, FAR),),
          (_at(NAIVE, FAR),), "above", 0.0),
    Claim("stale-gap-grows", GRADIENT, "and that gap is larger than on data 1 update old", ("rare", "common"),
          "objective", (_at(CORRECTED, FAR), _at(NAIVE, NEAR)), (_at(NAIVE, FAR), _at(CORRECTED, NEAR)), "above", 0.0),
    # This claim was added after the first runs, in which the plain weight diverged at this delay, and before any run
    # with a cap.
    Claim("stale-cap-helps", OWN, "on data 16 updates old, a weight capped at 2 ends with more E[R] - beta KL than a "
          "plain one", ("rare", "common"), "objective", (_at(CAPPED, FAR),), (_at(CORRECTED, FAR),), "above", 0.0),
    Claim("stale-capped-no-worse", OWN, "and with at least that of no weight", ("rare", "common"), "objective",
          (_at(CAPPED, FAR),), (_at(NAIVE, FAR),), "above", -MARGIN),
    Claim("precision-harmless", OWN, "a bf16 sampler costs k2 without a weight no objective that matters",
          ("rare",), "objective", (_at(NAIVE, 0, "bf16"),), (_at(NAIVE),), "within", MARGIN),
    Claim("precision-weight", OWN, "and the weight neither helps nor harms there", ("rare",), "objective",
          (_at(CORRECTED, 0, "bf16"),), (_at(NAIVE, 0, "bf16"),), "within", MARGIN),
)  # fmt: skip
