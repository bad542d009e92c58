"""The contract: what a user sees in each situation, and what is kept. Every host keeps every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.contract import checks
from tests.contract.driver import Driver

HOSTS = ("trl", "verl", "openrlhf")


@dataclass(frozen=True)
class Row:
    """One situation.

    Attributes:
        name: short, for the test's id.
        happens: the situation.
        sees: what the user sees.
        kept: what is kept.
        check: shows it for one host.
        full: slow, so that only ``make test-full`` runs it.
    """

    name: str
    happens: str
    sees: str
    kept: str
    check: Callable[[Driver], None]
    full: bool = False


_STOPS = "All ranks stop before the update, with one message: whose log-probs, on how many tokens, and what to do."
_KEPT = "The weights from before the update, and every checkpoint."

ROWS = (
    Row(
        "sampler_not_finite",
        "The weight divides by the sampler's log-probs, and one of them is NaN, +inf or -inf.",
        _STOPS,
        _KEPT,
        checks.not_finite("sampler", checks.BY_SAMPLER),
    ),
    Row(
        "old_not_finite",
        "The weight divides by the old policy's log-probs, and one of them is NaN, +inf or -inf.",
        _STOPS,
        _KEPT,
        checks.not_finite("old", checks.BY_OLD),
    ),
    Row(
        "policy_not_finite",
        "A log-prob of the policy is NaN, +inf or -inf in training.",
        _STOPS,
        _KEPT,
        checks.not_finite("policy", "k2@loss"),
    ),
    Row(
        "reference_not_finite",
        "A log-prob of the reference is NaN, +inf or -inf.",
        _STOPS,
        _KEPT,
        checks.not_finite("reference", "k2@loss"),
    ),
    Row(
        "one_rank_not_finite",
        "Only one of two ranks has a log-prob that is not finite.",
        _STOPS + " No rank waits for another.",
        _KEPT,
        checks.not_finite_on_one_rank,
    ),
    Row(
        "unused_not_finite",
        "A log-prob of sampler or old policy is not finite, and no weight divides by it.",
        "The run goes on. Metrics take the old log-prob, or the policy's own, in its place.",
        "The gradient, which does not depend on it.",
        checks.not_finite_and_unused,
    ),
    Row(
        "score_not_finite",
        "Under @reward or @advantage, a log-prob of policy or reference is not finite at rollout.",
        "The run stops before the advantages are used, with the same message.",
        _KEPT,
        checks.not_finite_in_scores,
    ),
    Row(
        "empty_mask",
        "A batch has no response token at all.",
        "The run goes on; the KL of the batch is 0. OpenRLHF divides by the number of tokens, and ends as it does "
        "alone.",
        "Everything.",
        checks.empty_mask,
    ),
    Row(
        "empty_rank",
        "One of two ranks has no response token.",
        "The run goes on; metrics are those of the other rank's tokens.",
        "Everything.",
        checks.empty_rank,
    ),
    Row(
        "split",
        "Ranks hold different numbers of tokens, or a batch is split into micro-batches.",
        "The same kl/ metrics as for the whole batch in one process.",
        "Everything.",
        checks.split,
    ),
    Row(
        "changed_beta",
        "The host's coefficient is changed during the run.",
        "The new coefficient is used from then on, and kl/beta shows it.",
        "Everything.",
        checks.changed_beta,
    ),
    Row(
        "changed_beta_under_a_schedule",
        "The host's coefficient is changed during a run whose spec has a beta: option.",
        "All ranks stop before the update and say that two settings control beta.",
        _KEPT,
        checks.changed_beta_under_a_schedule,
    ),
    Row(
        "resume",
        "A run is resumed from a checkpoint.",
        "The beta controller goes on where it was.",
        "The controller's state.",
        checks.resume,
    ),
    Row(
        "resume_under_another_spec",
        "A run is resumed under another spec than that of its checkpoint.",
        "An error that names both specs. KL_PLUGINS_ALLOW_SPEC_CHANGE=1 allows the change.",
        "The checkpoint.",
        checks.resume_under_another_spec,
    ),
    Row(
        "truncated_sampling",
        "Responses are sampled with top-p or top-k.",
        "The receipt shows the settings and the size of the effect. A spec whose weight is a product over tokens is "
        "refused before a model is loaded; KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS=1 allows it.",
        "Nothing has started.",
        checks.truncated_sampling,
    ),
    Row(
        "raw_log_probs",
        "The engine reports raw log-probs while it samples with a temperature, and the weight divides by them.",
        "An error before a model is loaded that names the setting.",
        "Nothing has started.",
        checks.raw_log_probs,
    ),
    Row(
        "behaviour_old",
        "The weight divides by old log-probs, because the spec says so or because there are no others.",
        "The receipt says in which case that is exact.",
        "Everything.",
        checks.behaviour_old_is_said,
    ),
    Row(
        "aggregation",
        "The host adds up, or averages, the terms of all tokens.",
        "The receipt says how.",
        "Everything.",
        checks.aggregation_is_said,
    ),
    Row(
        "wrong_key",
        "A spec stands in a setting where it cannot work.",
        "An error before a model is loaded that names the right place.",
        "Nothing has started.",
        checks.wrong_key,
    ),
    Row(
        "unused",
        "kl-plugins is installed and attached, and no spec is set.",
        "Nothing.",
        "The host's own computation, bit by bit.",
        checks.unused,
    ),
    Row(
        "whole_program",
        "The host's own program runs, and after some updates a log-prob of the sampler is NaN.",
        "The program ends with a status that is not 0 and with the message above.",
        "The checkpoint from before.",
        checks.whole_program,
    ),
)


def rows() -> list[object]:
    """The rows as pytest parameters, for ``@pytest.mark.parametrize("row", rows())``; slow ones are marked ``full``."""
    return [pytest.param(row, id=row.name, marks=[pytest.mark.full] if row.full else []) for row in ROWS]
