"""What is counted, and what the plugin should add, on paper."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins import KLSpec
from kl_plugins.metrics import REDUCTIONS

MICRO_BATCHES = 2
"""Per rank and optimizer step."""

PROCESSES = (1, 2, 4)

NATIVE = {"trl": "k3", "verl": "low_var_kl", "openrlhf": "k3"}
"""Each host's own KL, which the specs are held against."""

SCHEDULE = "k2@loss/is:token/behaviour:old/beta:adaptive-0.1-64"
SPECS = {
    "trl": ("k3@loss", SCHEDULE, "exact@loss", "k1@reward", "k1@advantage"),
    "verl": ("k3@loss", SCHEDULE),
    "openrlhf": ("k3@loss", SCHEDULE, "k1@reward", "k1@advantage"),
}


@dataclass(frozen=True)
class Added:
    """What a spec adds to one optimizer step of one rank.

    Attributes:
        gathers: bytes that this rank puts into each of its all-gathers.
        reductions: bytes of each of its all-reduces.
    """

    gathers: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()

    @property
    def calls(self) -> int:
        """Number of collectives."""
        return len(self.gathers) + len(self.reductions)

    @property
    def bytes(self) -> int:
        """Bytes that this rank puts in."""
        return sum(self.gathers) + sum(self.reductions)

    def traffic(self, ranks: int) -> float:
        """Bytes that each rank sends, by ring algorithms: (R-1) b for an all-gather, 2 (R-1)/R b for an all-reduce."""
        return (ranks - 1) * sum(self.gathers) + 2 * (ranks - 1) / ranks * sum(self.reductions)

    def hops(self, ranks: int, tree: bool = False) -> int:
        """Messages that follow one another, each of which costs one latency: in a ring, or in a binary tree."""
        longest = (ranks - 1).bit_length() if tree else ranks - 1
        return longest * (len(self.gathers) + 2 * len(self.reductions))


def keys(spec: KLSpec) -> tuple[int, int]:
    """Metrics of a micro-batch: means, and maxima; beta, which every rank knows, is not among them."""
    found = [key for key in REDUCTIONS if key != "kl/exact" or (spec.needs_exact and spec.placement == "loss")]
    largest = sum(REDUCTIONS[key] == "max" for key in found)
    return len(found) - largest, largest


def paper(host: str, text: str, micro_batches: int, sequences: int) -> Added:
    """What the plugin adds by its own documentation; no term has tokens, vocabulary, parameters or ranks in it.

    A single process makes the same calls where a launcher gave it a process group, and none where it has no group.

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        text: the spec.
        micro_batches: per rank and optimizer step.
        sequences: per rank and rollout batch; one rollout batch per optimizer step.
    """
    spec = KLSpec.parse(text)
    means, largest = keys(spec)
    controller = (12,) if spec.beta is not None and spec.placement == "loss" else ()  # three float32 sums
    if host == "trl":
        pooled = sum(how == "pooled" for how in REDUCTIONS.values())
        # float64: counts of log-probs that are not finite, with the tokens; a forbidden beta; a deviating head.
        check = 8 * (5 + 1 + 1)
        # In the same gather: means with beta, tokens and micro-batches; two squares, which pooled metrics are made of;
        # maxima.
        metrics = (check + 8 * (means - pooled + 3 + 2 + largest),) * micro_batches
        # Once per rollout; the reward gathers one float32 per completion beside it.
        rollout = {"loss": (), "advantage": (check,), "reward": (check, 4 * sequences)}[spec.placement]
        return Added(metrics + rollout, controller)
    if host == "verl":
        # All in float64, once per optimizer step: four counts of log-probs that are not finite, the response tokens,
        # and whether a coefficient was changed beside a schedule; with a schedule what its controller observes. Metrics
        # go the way that veRL has for them.
        return Added((), (8 * (6 + 3 * bool(controller)),) if spec.placement == "loss" else ())
    if spec.placement != "loss":
        return Added()  # OpenRLHF's driver shapes rewards and advantages
    pooled = sum(how == "pooled" for how in REDUCTIONS.values())
    # All in float64. Once per optimizer step: four counts of log-probs that are not finite, the tokens, and whether a
    # coefficient was changed beside a schedule; with a schedule what its controller observes; with exact terms how far
    # two references are apart.
    check = 8 * (5 + 1 + 3 * bool(controller) + spec.needs_exact)
    # Once per rollout batch, not per micro-batch: means with beta, tokens and micro-batches, two squares that pooled
    # metrics are made of, and the estimator's mean with its tokens; maxima.
    return Added((), (8 * (means - pooled + 3 + 2 + 2), 8 * largest, check))
