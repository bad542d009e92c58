"""Every spec that the grammar can express without truncation, by the rules of the design, not by asking the parser."""

from __future__ import annotations

from kl_plugins import KLSpec
from kl_plugins.spec.errors import KLSpecError

KL_ESTIMATORS = ("k1", "k2", "k3", "k3+", "abs")
F_ESTIMATORS = ("jeffreys", "jsd", "hellinger", "chi2", "alpha-0.5", "alpha-1", "alpha-3")
SAMPLED = KL_ESTIMATORS + F_ESTIMATORS
ESTIMATORS = (*SAMPLED, "exact")


def futures(estimator: str) -> tuple[str, ...]:
    """Future terms that the estimator may be given: an f-divergence has its own, the others any KL estimate."""
    return ("own",) if estimator in F_ESTIMATORS else ("k1", "k3", "exact")


def corrections(estimator: str) -> tuple[str, ...]:
    """Weights on a loss; an exact own term is already averaged over its token, so a token weight means nothing."""
    return ("none", "prefix", "sequence") if estimator == "exact" else ("none", "token", "prefix", "sequence")


TOKEN_LOSSES = [f"{e}@loss/is:{c}" for e in ESTIMATORS for c in corrections(e)]
SEQUENCE_LOSSES = [
    f"{e}@loss/horizon:sequence/future:{f}/is:{c}"
    for e in ESTIMATORS
    for f in futures(e)
    for c in (*corrections(e), "decision")
]
LOSSES = TOKEN_LOSSES + SEQUENCE_LOSSES
TOP_LOSSES = [
    *(f"exact@loss/top:1/is:{c}" for c in ("none", "token", "prefix", "sequence")),
    *(f"exact@loss/top:1/horizon:sequence/is:{c}" for c in ("none", "token", "prefix", "sequence", "decision")),
]
"""They need three tokens at least: a bucket of one has no remainder."""

REWARDS = [f"{e}@reward" for e in SAMPLED]
ADVANTAGES = [
    *(f"{e}@advantage/horizon:token" for e in SAMPLED),
    *(f"{e}@advantage/horizon:sequence/future:{f}" for e in SAMPLED for f in futures(e)),
    "exact@advantage",
]


def parse(text: str) -> KLSpec:
    """Parse a spec, saying `allow:biased` exactly where the parser asks for it."""
    try:
        return KLSpec.parse(text)
    except KLSpecError:
        return KLSpec.parse(f"{text}/allow:biased")


def targets_none(text: str) -> bool:
    """What the design says: is this spec's gradient that of no named objective?"""
    estimator, _, placement = text.partition("/")[0].partition("@")
    if placement == "reward":
        return estimator != "k1"
    if placement == "advantage":
        return estimator not in ("k1", "exact")
    if estimator == "k1":
        return True
    if "horizon:sequence" not in text:
        return False
    if "is:token" in text or "is:prefix" in text:
        return True
    return not ("future:own" in text or estimator in ("k2", "k3+", "exact"))
