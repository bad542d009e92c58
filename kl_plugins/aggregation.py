"""The ways in which a host turns per-token terms into one loss, and their effect on the gradient of a spec.

The target of a spec is a sum over response tokens. A host may divide that sum by a constant, which only rescales beta.
It may also divide the terms of each response by the length of that response, which changes the relative weights of the
responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["token sum", "token mean", "sequence mean", "constant"]

MEANINGS: dict[str, str] = {
    "token sum": "terms are added up over the tokens of each response; the target is unchanged",
    "constant": "terms are added up and divided by a constant; the target is unchanged, and beta is rescaled by it",
    "token mean": (
        "terms are averaged over all tokens of the batch; the target is unchanged up to one factor per batch, by which "
        "beta is rescaled"
    ),
    "sequence mean": (
        "terms are averaged over each response and then over responses, so each token is weighted by 1/|y|, where |y| "
        "is the length of its response: the tokens of short responses count more than under the target"
    ),
}
"""What each kind of aggregation computes, and its effect on the target of a spec."""

SEQUENCE_MEAN_CAVEAT = (
    "the host averages over each response first, so each response y is weighted by 1/|y|, the inverse of its length: "
    "the result is not the gradient of the stated target unless all responses have the same length (it was 21 to 23 % "
    "off in one enumeration)"
)


@dataclass(frozen=True)
class Aggregation:
    """How a host aggregates the per-token terms in one run.

    Attributes:
        kind: a key of :data:`MEANINGS`.
        setting: the host's setting that determines ``kind``, with its value; shown in messages.
    """

    kind: Kind
    setting: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.setting})"

    @property
    def caveats(self) -> tuple[str, ...]:
        """The differences between the aggregated gradient and the stated target; empty if there are none."""
        return (SEQUENCE_MEAN_CAVEAT,) if self.kind == "sequence mean" else ()
