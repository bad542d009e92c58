"""Effect of a weighted term on a token that the policy has nearly dropped: an unbiased gradient can be unstable.

p, r and m are a token's probabilities under policy, reference and behaviour policy. The force on a sampled token is the
weight p/m times the coefficient c(u), with u = log(p/r). Noise pushes the probabilities of sampled tokens down a
little. On fresh data, new samples correct this; on stale data, the same samples push again. The force as p goes to 0
decides whether a token comes back. If the coefficient grows at least like 1/p, the force remains. If it grows more
slowly, the force vanishes, unless a floor limits the weight from below. ``tests/oracle/test_floor.py`` shows this with
exact expectations.
"""

from __future__ import annotations

from kl_plugins.explain.formulas import row_of
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import format_number


def stability(spec: KLSpec) -> str:
    """Return a statement on the pull of a ``@loss`` term as the policy's probability of a token goes to 0, or "".

    Args:
        spec: a parsed spec.
    """
    row = row_of(spec)
    if spec.placement != "loss" or row.kind == "none":
        return ""
    if spec.top is not None:
        return (
            "The own term is a sum over a set of tokens and one bucket, so no noise of sampled tokens drives tokens of "
            "the set out on stale data. All other tokens are held together, as one bucket; only how they differ "
            "inside it is sampled."
        )
    if spec.estimator == "exact":
        return (
            "The own term is a sum over the vocabulary and not over a sample, so no noise of sampled tokens drives "
            "tokens out on stale data."
        )
    if not spec.needs_behaviour:
        return (
            "Without a weight, the pull on a token that the policy has all but dropped is the coefficient itself, "
            "which does not fade. Stale data bias this term, but they do not take its pull away."
        )
    if spec.floor is not None:
        return (
            f"Where the policy drops a token, the pull does not fade: the weight stays at {format_number(spec.floor)}, "
            "and the coefficient does not fade."
        )
    if spec.band is not None and spec.band[0] > 0:
        return (
            f"A token whose weight falls below {format_number(spec.band[0])} is left out by the band, so nothing pulls "
            "it back: on stale data this can run away."
        )
    where = "Where the policy drops a token (its probability p goes to 0), the pull, weight times coefficient,"
    if row.keeps_pull is None:
        return (
            f"{where} fades unless the coefficient grows like 1/p. The registered row {spec.estimator!r} does not say "
            "whether it does."
        )
    if row.keeps_pull:
        return f"{where} does not fade: the coefficient of {spec.estimator} grows at least like 1/p."
    return (
        f"{where} fades to 0. An unbiased gradient need not be a stable one: on stale data this can run away. "
        f"{_remedy(spec)}"
    )


def _remedy(spec: KLSpec) -> str:
    possible = spec.correction == "token" and spec.horizon == "token" and not spec.norm and spec.band is None
    if possible and row_of(spec).restoring:
        return "floor:<c> keeps the pull, at the price of a bias where weights are below c."
    forward = "k3, " if spec.horizon == "token" else ""  # With a future term, k3 estimates no divergence.
    return f"{forward}jeffreys, chi2 and alpha-<a> with a >= 1 keep it; so does k2@loss/is:token/floor:<c>."
