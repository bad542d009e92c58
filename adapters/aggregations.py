"""How much one token of a response counts in a host's loss: the rules that hosts follow, and what they make of beta.

Each host's table says which of its modes follows which rule. ``benchmarks.hosts`` measures the factors on real updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kl_plugins.aggregation import Kind

Rule = Literal["batch", "micro-batch", "response", "responses", "constant", "longest"]


@dataclass(frozen=True)
class TokenRule:
    """One rule.

    Attributes:
        name: a key of :data:`RULES`.
        kind: what it does to the target of a spec.
        factor: the factor of each token's KL, in words.
    """

    name: Rule
    kind: Kind
    factor: str


RULES: dict[Rule, TokenRule] = {
    rule.name: rule
    for rule in (
        TokenRule("batch", "token mean", "beta / (number of response tokens in the batch)"),
        TokenRule("micro-batch", "token mean", "beta / (response tokens in the micro-batch x number of micro-batches)"),
        TokenRule("response", "sequence mean", "beta / (number of responses x length of the token's own response)"),
        TokenRule("responses", "token sum", "beta / (number of responses)"),
        TokenRule("constant", "constant", "beta / (number of responses x a constant, the length limit by default)"),
        TokenRule("longest", "constant", "beta / (number of responses x length of the micro-batch's longest response)"),
    )
}
"""The rules by name."""


def token_weights(
    rule: Rule, lengths: Sequence[int], width: int, micro_batches: Sequence[Sequence[int]] | None = None
) -> list[float]:
    """Return the factor on beta of each token of each response, for one optimizer step.

    Args:
        rule: the rule of the host's mode.
        lengths: response tokens per response.
        width: largest possible length of a response.
        micro_batches: the responses of each micro-batch, by index; needed for ``micro-batch`` and ``longest``.

    Raises:
        ValueError: the rule depends on the micro-batches, and none are given.
    """
    count, tokens = len(lengths), sum(lengths)
    if rule == "batch":
        return [1 / tokens] * count
    if rule == "response":
        return [1 / (count * length) for length in lengths]
    if rule == "constant":
        return [1 / (count * width)] * count
    if rule == "responses":
        return [1 / count] * count
    if micro_batches is None:
        raise ValueError(f"the weights of the rule {rule!r} depend on the micro-batches")
    found = [0.0] * count
    for batch in micro_batches:
        within = [lengths[index] for index in batch]
        size = sum(within) * len(micro_batches) if rule == "micro-batch" else count * max(within)
        for index in batch:
            found[index] = 1 / size
    return found


def strength(rule: Rule, length: float | None, limit: float | None) -> float | None:
    """Return how many times as strong a given beta is as the same beta under a mean over all response tokens.

    All responses are taken to have the same length; this is the inverse of the factor of ``benchmarks.hosts``.

    Args:
        rule: the rule of the host's mode.
        length: mean number of tokens of a response.
        limit: the constant of the rule ``constant``, in tokens.

    Returns:
        The ratio, or None if it depends on a number that is not given.
    """
    if rule == "responses":
        return length
    if rule == "constant":
        return length / limit if length and limit else None
    return 1.0
