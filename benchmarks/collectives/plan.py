"""The runs in which collectives are counted, and the model of what the plugin should add."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins import KLSpec
from kl_plugins.metrics import REDUCTIONS
from kl_plugins.spec.grammar import numbers_per_token
from kl_plugins.spec.observation import Observation, looks_like_observation

MICRO_BATCHES = 2
"""Number of micro-batches per rank and optimizer step."""

PROCESSES = (1, 2, 4)

NATIVE = {"trl": "k3", "verl": "low_var_kl", "openrlhf": "k3"}
"""Each host's own KL, with which the specs are compared."""

SCHEDULE = "k2@loss/is:token/behaviour:old/beta:adaptive-0.1-64"
TOP_K = "exact@loss/top:8"
"""The models of these runs have small vocabularies, so k is small. The bytes by k are those of :func:`carried`."""
OBSERVED = "observe:k2@loss/is:token"
SPECS = {
    "trl": ("k3@loss", SCHEDULE, "exact@loss", TOP_K, "k1@reward", "k1@advantage", OBSERVED),
    "verl": ("k3@loss", SCHEDULE, TOP_K, f"low_var_kl/{OBSERVED}"),
    "openrlhf": ("k3@loss", SCHEDULE, TOP_K, "k1@reward", "k1@advantage", f"k3/{OBSERVED}"),
}
MOST_CARRIED = 600
"""Largest accepted number of bytes per response token that the driver receives for the default k."""


@dataclass(frozen=True)
class Added:
    """The collectives that a spec adds to one optimizer step of one rank.

    Attributes:
        gathers: bytes that this rank contributes to each of its all-gathers.
        reductions: bytes of each of its all-reduces.
    """

    gathers: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()

    @property
    def calls(self) -> int:
        """Return the number of collectives."""
        return len(self.gathers) + len(self.reductions)

    @property
    def bytes(self) -> int:
        """Return the bytes that this rank contributes."""
        return sum(self.gathers) + sum(self.reductions)

    def traffic(self, ranks: int) -> float:
        """Return the bytes that each rank sends in a ring.

        An all-gather of b bytes on R ranks sends (R-1) b, and an all-reduce sends 2 (R-1)/R b.
        """
        return (ranks - 1) * sum(self.gathers) + 2 * (ranks - 1) / ranks * sum(self.reductions)

    def hops(self, ranks: int, tree: bool = False) -> int:
        """Return the number of consecutive messages in a ring or a binary tree. Each message costs one latency."""
        longest = (ranks - 1).bit_length() if tree else ranks - 1
        return longest * (len(self.gathers) + 2 * len(self.reductions))


def carried(spec: KLSpec) -> int:
    """Return the bytes per response token that the reference's workers send to the driver, beside the log-probs.

    The driver sends as many to the policy's workers. Each number has four bytes.

    Args:
        spec: a spec; without ``top:`` nothing more is sent.
    """
    return 0 if spec.top is None else 4 * numbers_per_token(spec.top, spec.draws)


def keys(spec: KLSpec) -> tuple[int, int]:
    """Return how many metrics of a micro-batch are means and how many are maxima.

    Beta is not counted, because every rank knows it.
    """
    found = [key for key in REDUCTIONS if key != "kl/exact" or (spec.needs_exact and spec.placement == "loss")]
    largest = sum(REDUCTIONS[key] == "max" for key in found)
    return len(found) - largest, largest


def paper(host: str, text: str, micro_batches: int, sequences: int) -> Added:
    """Return the collectives that the plugin adds according to its documentation.

    No term depends on the number of tokens, the vocabulary, the parameters or the ranks. A single process makes the
    same calls if a launcher gave it a process group, and no calls if it has no group.

    Args:
        host: ``trl``, ``verl`` or ``openrlhf``.
        text: the spec, or a text with ``observe``.
        micro_batches: number of micro-batches per rank and optimizer step.
        sequences: number of sequences per rank and rollout batch, with one rollout batch per optimizer step.
    """
    observed = looks_like_observation(text)
    spec = Observation.parse(text).measured if observed else KLSpec.parse(text)
    means, largest = keys(spec)
    means += observed  # the share of the tokens that were observed
    controller = (12,) if spec.beta is not None and spec.placement == "loss" else ()  # three float32 sums
    if host == "trl":
        pooled = sum(how == "pooled" for how in REDUCTIONS.values())
        # In float64: four counts of log-probs that are not finite and the number of tokens; one number for a beta that
        # is not allowed; one number each for a head and for top-k numbers that differ.
        check = 8 * (5 + 1 + 2)
        # The same gather also holds means with beta, tokens and micro-batches; two sums of squares for the pooled
        # metrics; and maxima.
        metrics = (check + 8 * (means - pooled + 3 + 2 + largest),) * micro_batches
        # Once per rollout; with a KL in the reward, one float32 per completion is also gathered.
        rollout = {"loss": (), "advantage": (check,), "reward": (check, 4 * sequences)}[spec.placement]
        return Added(metrics + rollout, controller)
    if host == "verl" and observed:
        return Added()  # There is nothing to check before the step.
    if host == "verl":
        # All numbers are float64 and are sent once per optimizer step: four counts of log-probs that are not finite,
        # the number of response tokens, and whether a coefficient was changed although there is a schedule. With a
        # schedule, the observations of its controller are added, and with `top:` whether its numbers agree with the
        # log-probs. Metrics use veRL's own way.
        numbers = 6 + 3 * bool(controller) + (spec.top is not None)
        return Added((), (8 * numbers,) if spec.placement == "loss" else ())
    if spec.placement != "loss":
        return Added()  # OpenRLHF's driver computes rewards and advantages.
    pooled = sum(how == "pooled" for how in REDUCTIONS.values())
    # All numbers are float64. Once per optimizer step: four counts of log-probs that are not finite, the number of
    # tokens, and whether a coefficient was changed although there is a schedule. With a schedule, the observations of
    # its controller are added, and with exact terms the difference between two references.
    check = 8 * (5 + 1 + 3 * bool(controller) + spec.needs_exact)
    # Once per rollout batch, not per micro-batch: means with beta, tokens and micro-batches, two sums of squares for
    # the pooled metrics, and the estimator's mean with its tokens; then maxima.
    metrics = (8 * (means - pooled + 3 + 2 + 2), 8 * largest)
    return Added((), metrics if observed else (*metrics, check))
