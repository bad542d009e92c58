"""How a host turns per-token terms into one number, and what that does to the gradient that a spec estimates.

The target of a spec is a sum over response tokens. A host may divide that sum by a constant, which only rescales beta,
or by each response's own length, which changes how much each response counts.
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
        "terms are averaged over each response and then over responses, so a token counts 1/|y| of its response: short "
        "responses count more than under the target"
    ),
}
"""What each way of aggregation does to the target."""

SEQUENCE_MEAN_CAVEAT = (
    "the host averages over each response first, so every response is weighted by 1/|y|: the result is not the "
    "gradient of the stated target unless all responses have one length (21 to 23 % off in one enumeration)"
)


@dataclass(frozen=True)
class Aggregation:
    """What one host does with the terms of one run.

    Attributes:
        kind: a key of :data:`MEANINGS`.
        setting: the host's setting that decides it, with its value, for messages.
    """

    kind: Kind
    setting: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.setting})"

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader of the target has to know beside it."""
        return (SEQUENCE_MEAN_CAVEAT,) if self.kind == "sequence mean" else ()
