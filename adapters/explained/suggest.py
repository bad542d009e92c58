"""Settings to paste: the spec of the present gradient, the spec that we suggest, and the equivalent beta."""

from __future__ import annotations

from collections.abc import Iterator

from kl_plugins.adapters.aggregations import strength
from kl_plugins.adapters.explained.run import ConfiguredRun, Term
from kl_plugins.explain.config import Suggestion

DEFAULT = "default"
SAMPLER = "k2@loss/is:token/behaviour:sampler/floor:0.5"
"""The default for asynchronous training, where recomputed log-probs hide how old the data are."""

DEFAULT_BETA = 0.01
"""A first beta where a run has none; the value to search around."""


def suggestions(run: ConfiguredRun, length: float | None) -> Iterator[Suggestion]:
    """Yield the suggestions for a run.

    Args:
        run: the run.
        length: mean number of tokens of a response; None if it is not known.
    """
    if not run.terms:
        yield Suggestion(
            "A KL term, if you want one",
            run.paste(DEFAULT, DEFAULT_BETA, "loss"),
            "The run has none. beta is a first value to search around, not an equivalent of anything.",
        )
    for term in run.terms:
        if term.native and term.equal:
            yield Suggestion(
                "The same gradient as now, as a spec",
                run.paste(str(term.spec), term.beta, term.spec.placement),
                "beta is the same, because the host aggregates both alike."
                + (" Without the host's clamps, no token loses its gradient." if term.clamp else ""),
            )
        if term.native or term.spec.target == "none":
            yield _recommended(run, term)
        if term.rule is not None:
            yield _portable(run, term, length)


def _recommended(run: ConfiguredRun, term: Term) -> Suggestion:
    if term.in_loss:
        fresh = not run.staleness.asynchronous
        name = "`default`" if fresh else "`default` with the log-probs of the engine"
        return Suggestion(
            "What we suggest",
            run.paste(DEFAULT if fresh else SAMPLER, term.beta, "loss"),
            f"{name} is the reverse KL of tokens, weighted for stale data, with a floor under the weight. beta is the "
            "same: near the reference the coefficients of k2 and k3 agree, and the host aggregates both alike.",
        )
    return Suggestion(
        "What we suggest",
        run.paste("k1@advantage", term.beta, "advantage"),
        "The KL of the tokens that follow, subtracted after all normalisation. beta is the same where rewards are not "
        "divided by a standard deviation; otherwise beta / (the standard deviation of a group's rewards) is as strong "
        "as beta is now, on groups whose rewards differ.",
    )


def _portable(run: ConfiguredRun, term: Term, length: float | None) -> Suggestion:
    assert term.rule is not None
    limit = run.length_limit
    ratio = strength(term.rule, length, limit)
    if ratio is not None:
        lines = (f"beta {term.beta:g} here = beta {term.beta * ratio:.4g} under a mean over all response tokens",)
    elif term.rule == "responses":
        lines = (f"beta {term.beta:g} here = beta {term.beta:g} x (mean response length) under a mean over all tokens",)
    else:
        size = f"{limit:g}" if limit else "the constant"
        equal = f"beta {term.beta:g} x (mean response length) / {size}"
        lines = (f"beta {term.beta:g} here = {equal} under a mean over all tokens",)
    return Suggestion(
        "The equivalent beta elsewhere",
        lines,
        "A mean over all response tokens is the default of TRL (loss_type dapo), of veRL (loss_agg_mode token-mean) "
        "and of OpenRLHF's KL loss."
        + (" The number is right if all responses have the same length." if term.rule != "batch" else "")
        + (" Give the mean response length with --length." if ratio is None else ""),
    )
