"""Names, meanings and reductions of the ``kl/`` metrics.

They are apart from :mod:`kl_plugins.metrics`, so that a reader of logs does not have to import torch.
"""

from __future__ import annotations

from typing import Literal

REDUCTIONS: dict[str, Literal["mean", "max", "pooled"]] = {
    "kl/value": "mean",
    "kl/exact": "mean",
    "kl/reverse_k1": "mean",
    "kl/reverse_k1_is": "mean",
    "kl/log_ratio/mean": "mean",
    "kl/log_ratio/max": "max",
    "kl/coef/mean": "mean",
    "kl/coef/std": "pooled",
    "kl/coef/max": "max",
    "kl/ess": "pooled",
    "kl/weight/mean": "mean",
    "kl/weight/max": "max",
    "kl/cap_frac": "mean",
    "kl/floor_frac": "mean",
    "kl/dead_frac": "mean",
    "kl/disagree": "pooled",
    "kl/trust_region": "mean",
    "kl/active": "mean",
}
"""Every key, and how a host combines it over micro-batches, ranks and the logging window.

``mean``: mean weighted by response tokens. ``max``: the largest value. ``pooled``: a ratio or a standard deviation;
``adapters/metrics.py`` computes it again from combined sums, so that it does not depend on how tokens were split into
micro-batches. ``kl/exact`` exists only if exact values are given.
"""

MEANINGS: dict[str, str] = {
    "kl/value": "mean of k3, an estimate of the reverse KL of each token, nats, which is never negative; under "
    "top: the same number as kl/exact",
    "kl/exact": "mean of the full-vocabulary KL, nats; under top: mean of the KL over set and bucket, which is a lower "
    "bound; with draws: plus what the draws add, which is an estimate of any sign; only under a spec with exact terms",
    "kl/reverse_k1": "mean of k1, which is u = log policy - log reference, nats; may be negative",
    "kl/reverse_k1_is": "mean of k1 times the weight, nats",
    "kl/log_ratio/mean": "mean of |u|, nats",
    "kl/log_ratio/max": "largest |u|, nats",
    "kl/coef/mean": "mean coefficient: what multiplies the gradient of a token's log-prob, or the penalty",
    "kl/coef/std": "standard deviation of the coefficient",
    "kl/coef/max": "largest absolute coefficient",
    "kl/ess": "effective share of samples under the weight before a floor: 1 is fresh, near 0 is far from the policy",
    "kl/weight/mean": "mean weight before a floor; 1 in expectation for an exact weight",
    "kl/weight/max": "largest weight before a floor",
    "kl/cap_frac": "share of tokens whose weight or coefficient cap, band or clip changed",
    "kl/floor_frac": "share of tokens whose weight the floor raised",
    "kl/dead_frac": "share of tokens without a gradient although policy and reference differ",
    "kl/disagree": "|mean k1 - kl/value| over kl/value; 0 where that is below 1e-4 nats",
    "kl/trust_region": "mean of rho - 1 - log rho, an estimate of KL(behaviour policy || policy), nats",
    "kl/active": "1 where a term was computed",
}
"""Meaning of each metric, for the documentation and for readers of a log."""

AGE: dict[str, str] = {
    "kl/age/mean": "mean age of the responses that are trained on: how many times the weights were sent to the engine "
    "since it had those that generated the first token; only in asynchronous trainers that know it",
    "kl/age/max": "the largest of these ages",
}
"""Meaning of the metrics that only a trainer of asynchronous rollouts can give; they are about responses."""

LEAST_KL = 1e-4
"""``kl/disagree`` is 0 if ``kl/value`` is below this (nats), because it would then only compare noise with noise."""

COMPARED = ("host", "k1", "k2", "k3")
"""What a probe compares with the observed spec: the host's own KL, and sampled estimators without a weight."""

LEVELS = ("token", "prefix", "sequence")
"""The levels of the weight that a probe looks at. ``is:decision`` has the weights of ``is:prefix``."""

PROBE_SUMS = "probe/"
"""Prefix of the sums that the metrics of a probe are made of; they are no metrics themselves."""

_NAMES = {"host": "the host's own KL", **{name: f"{name} without a weight" for name in COMPARED[1:]}}

OBSERVATION: dict[str, str] = {
    "kl/observed": "only under observe, where the spec is measured and not applied: share of the response tokens on "
    "which it was computed; below 1 where log-probs are missing or not finite",
    **{
        f"kl/probe/{name}/cosine": f"cosine between the coefficients of {said} and of the observed spec, over the "
        "tokens: 1 is the same direction, 0 none in common; under top: between their gradients by the logits"
        for name, said in _NAMES.items()
    },
    **{
        f"kl/probe/{name}/norm_ratio": f"norm of the coefficients of {said}, divided by that of the observed spec; "
        "the spec pulls as strongly at beta times this number; under top: norm of the gradient by the logits, with the "
        "noise of the drawn token in it"
        for name, said in _NAMES.items()
    },
    **{f"kl/probe/{level}/weight": f"mean of an exact is:{level} weight; 1 in expectation" for level in LEVELS},
    **{
        f"kl/probe/{level}/ess": f"effective share of the tokens under an exact is:{level} weight; 1 is fresh"
        for level in LEVELS
    },
    "kl/probe/host/dead_frac": "share of the tokens that get no gradient from the host's own KL although policy and "
    "reference differ, because a clamp of the host holds its value",
    "kl/probe/kept_mass": "mean probability that truncated sampling (top-p, top-k, min-p) keeps",
}
"""Meaning of the metrics that exist only under ``observe`` and in the steps of its probes."""
