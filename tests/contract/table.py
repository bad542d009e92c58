"""The table of the contract: what a user sees in each situation, and what is kept. It holds for every host."""

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
        name: short name, used in the id of the test.
        happens: description of the situation.
        sees: what the user sees.
        kept: what stays unchanged or can still be used.
        check: function that checks the row for one host.
        full: whether the check is slow; ``make test-full`` runs it, ``make test`` does not.
    """

    name: str
    happens: str
    sees: str
    kept: str
    check: Callable[[Driver], None]
    full: bool = False


_STOPS = (
    "All ranks stop before the update with the same message. It says whose log-probs are not finite, on how many "
    "tokens, and what to do."
)
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
        _STOPS + " No rank is left waiting for another one.",
        _KEPT,
        checks.not_finite_on_one_rank,
    ),
    Row(
        "unused_not_finite",
        "A log-prob of the sampler or of the old policy is not finite, and no weight divides by it.",
        "The run continues. The metrics use the old log-prob, or that of the policy, instead.",
        "The gradient, which does not depend on this log-prob.",
        checks.not_finite_and_unused,
    ),
    Row(
        "score_not_finite",
        "Under @reward or @advantage, a log-prob of the policy or of the reference is not finite during the rollout.",
        "The run stops with the same message before the advantages are used.",
        _KEPT,
        checks.not_finite_in_scores,
    ),
    Row(
        "empty_mask",
        "A batch has no response tokens.",
        "The run continues, and the KL of the batch is 0. OpenRLHF divides by the number of tokens and stops with an "
        "error, as it does without kl-plugins.",
        "Everything.",
        checks.empty_mask,
    ),
    Row(
        "empty_rank",
        "One of two ranks has no response tokens.",
        "The run continues. The metrics are those of the tokens on the other rank.",
        "Everything.",
        checks.empty_rank,
    ),
    Row(
        "split",
        "Ranks hold different numbers of tokens, or a batch is split into micro-batches.",
        "The kl/ metrics are the same as for the whole batch in one process.",
        "Everything.",
        checks.split,
    ),
    Row(
        "changed_beta",
        "The host's KL coefficient is changed during the run.",
        "The new coefficient is used from then on, and kl/beta shows it.",
        "Everything.",
        checks.changed_beta,
    ),
    Row(
        "changed_beta_under_a_schedule",
        "The host's KL coefficient is changed during a run whose spec has a beta: option.",
        "All ranks stop before the update and say that two settings control beta.",
        _KEPT,
        checks.changed_beta_under_a_schedule,
    ),
    Row(
        "resume",
        "A run is resumed from a checkpoint.",
        "The controller of beta continues from its saved state.",
        "The controller's state.",
        checks.resume,
    ),
    Row(
        "resume_under_another_spec",
        "A run is resumed under a spec that differs from the spec of its checkpoint.",
        "An error names both specs. The setting KL_PLUGINS_ALLOW_SPEC_CHANGE=1 allows the change.",
        "The checkpoint.",
        checks.resume_under_another_spec,
    ),
    Row(
        "truncated_sampling",
        "Responses are sampled with top-p or top-k.",
        "The receipt shows the settings and the size of their effect. A spec whose weight is a product over tokens is "
        "refused before a model is loaded. The setting KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS=1 allows it.",
        "Nothing has started.",
        checks.truncated_sampling,
    ),
    Row(
        "raw_log_probs",
        "The engine reports raw log-probs while it samples with a temperature, and the weight divides by them.",
        "An error names the setting before a model is loaded.",
        "Nothing has started.",
        checks.raw_log_probs,
    ),
    Row(
        "behaviour_old",
        "The weight divides by the old policy's log-probs, because the spec requires them or because the sampler's are "
        "missing.",
        "The receipt says under which condition the weight is exact.",
        "Everything.",
        checks.behaviour_old_is_said,
    ),
    Row(
        "aggregation",
        "The host adds up or averages the terms of all tokens.",
        "The receipt says which of them it does.",
        "Everything.",
        checks.aggregation_is_said,
    ),
    Row(
        "top_is_said",
        "The spec is exact@loss/top, and the reference may run in another process than the policy.",
        "The receipt says how many numbers per token come from the pass that scores the reference.",
        "The reference is loaded once, and makes no further pass.",
        checks.top_is_said,
    ),
    Row(
        "wrong_key",
        "A spec is in a setting where it cannot work.",
        "An error names the right setting before a model is loaded.",
        "Nothing has started.",
        checks.wrong_key,
    ),
    Row(
        "unused",
        "kl-plugins is installed and attached, and no spec is set.",
        "The output is that of the host alone.",
        "The results of the host, bit by bit.",
        checks.unused,
    ),
    Row(
        "garbage",
        "An update has ended.",
        "Nothing.",
        "No object of kl-plugins waits for Python's garbage collector, and so no tensor that it refers to.",
        checks.garbage,
    ),
    Row(
        "observed",
        "The setting is observe with a spec, alone or with probes.",
        "The kl/ metrics of the spec, as if it were applied, and kl/observed; with probe:<n>, more every n steps.",
        "The results of the host, bit by bit.",
        checks.observed,
    ),
    Row(
        "observed_native",
        "The setting is observe alone.",
        "The kl/ metrics of the spec that has the gradient of the host's own KL.",
        "The results of the host, bit by bit.",
        checks.observed_native,
    ),
    Row(
        "observed_on_two_ranks",
        "Several ranks observe.",
        "The same numbers as for the whole batch in one process.",
        "The results of the host, bit by bit.",
        checks.observed_on_two_ranks,
    ),
    Row(
        "observed_not_finite",
        "A log-prob that the observed spec needs is not finite.",
        "The run continues, and kl/observed is below 1.",
        "The results of the host, bit by bit.",
        checks.observed_not_finite,
    ),
    Row(
        "observed_is_said",
        "The setting is observe, or an observe that is not possible.",
        "The receipt says that nothing changes. What cannot be observed is refused before a model is loaded.",
        "Everything.",
        checks.observed_is_said,
    ),
    Row(
        "resume_under_observe",
        "A run under a spec is resumed under observe, and so under the host's own KL.",
        "An error names both. The setting KL_PLUGINS_ALLOW_SPEC_CHANGE=1 allows the change.",
        "The checkpoint.",
        checks.resume_under_observe,
    ),
    Row(
        "whole_program",
        "The host's own program runs, and after some updates a log-prob of the sampler is NaN.",
        "The program ends with the message of the first row and with an exit status other than 0.",
        "The checkpoint that was written before.",
        checks.whole_program,
    ),
)


def rows() -> list[object]:
    """Return the rows as parameters for ``@pytest.mark.parametrize("row", rows())``; slow rows are marked ``full``."""
    return [pytest.param(row, id=row.name, marks=[pytest.mark.full] if row.full else []) for row in ROWS]
