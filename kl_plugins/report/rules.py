"""The rules by which the report finds something in a log: each is one condition on one series, with limit and source.

The functions that look at a series are in :mod:`kl_plugins.report.facts`. Rules with the source "rule of thumb" have a
limit that was chosen for this page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kl_plugins.controllers import LARGEST_BETA
from kl_plugins.report import facts
from kl_plugins.report.facts import Fact
from kl_plugins.report.series import Series
from kl_plugins.spec.grammar import DEFAULT_BOUND

Level = Literal["error", "warning", "note"]
"""``error``: the run is broken. ``warning``: something to change. ``note``: something to know."""

LEVELS: tuple[Level, ...] = ("error", "warning", "note")

Look = Callable[[Series, float], Fact | None]

MOST_FLOORED = 0.5
"""Share of raised weights above which a run logs a line by itself; see :data:`kl_plugins.adapters.metrics.MANY`."""

CHOOSE = 'docs: "Which spec should I use?", while it runs'
FAQ = "docs: questions by symptom"


@dataclass(frozen=True)
class Rule:
    """One condition on one metric.

    Attributes:
        name: short name, for links and tests.
        metrics: the metrics that it looks at: keys, ``@`` and a role of the framework's metrics, or ``*`` for all. The
            framework's own KL is looked at only if the log has no ``kl/`` metrics.
        level: how serious it is.
        look: sees the condition in a series.
        limit: the limit that ``look`` gets.
        condition: the condition in words, for the list of all rules.
        says: the finding, with ``{when}``, ``{key}``, ``{value}``, ``{before}``, ``{first}`` and ``{unit}``.
        remedy: what can be done about it.
        source: where the condition and its limit come from.
    """

    name: str
    metrics: tuple[str, ...]
    level: Level
    look: Look
    limit: float
    condition: str
    says: str
    remedy: str
    source: str


RULES: tuple[Rule, ...] = (
    Rule(
        "not-finite", ("*",), "error", facts.not_finite, 0.0,
        "a value is NaN or infinite",
        "{when}, {key} is not a finite number.",
        "Find the first such step of all metrics: what comes later follows from it. If the loss or a log-prob is not "
        "finite, resume from the last checkpoint before it with a smaller learning rate.",
        f"{FAQ}, the KL is NaN or infinite; verl#891, trl#3015",
    ),
    Rule(
        "inactive", ("kl/active",), "error", facts.ever_below, 0.999,
        "kl/active below 1 in any step",
        "{when}, a part of the micro-batches was computed without the term ({key} {value}).",
        "Look for an error of kl-plugins in the log of the workers, and report it.",
        f"{FAQ}, the KL is 0 all the time",
    ),
    Rule(
        "negative-kl", ("kl/value", "kl/exact"), "error", facts.ever_below, -0.001,
        "kl/value or kl/exact below -0.001 nats",
        "{when}, {key} is negative ({value}). A mean of k3 and an exact KL cannot be; an estimate with draws can, but "
        "hardly by so much.",
        "If the spec has top: and the log is of kl-plugins 0.2 or older, kl/exact held a signed remainder. Otherwise "
        "policy and reference do not hold probabilities of the same tokens: check mask and vocabulary.",
        f"{FAQ}, the KL is negative; verl#7856",
    ),
    Rule(
        "negative-k1", ("kl/reverse_k1",), "warning", facts.below, -0.001,
        "kl/reverse_k1 below -0.001 nats, lasting or in a tenth of all steps",
        "{when}, the mean of k1 is negative (median of {key}: {value} nats). Over data that the policy drew itself it "
        "would be the KL, which is never negative.",
        "The tokens were not drawn from the policy whose log-probs are used: the data are stale (look at kl/ess), or "
        "the engine samples with another temperature, top-p or top-k (kl-plugins doctor --config FILE says so). With "
        "few tokens per step it can also be chance.",
        f"{FAQ}, the KL is negative; trl#351",
    ),
    Rule(
        "kl-at-start", ("kl/value", "kl/exact", "@kl"), "warning", facts.off_at_start, 0.01,
        "KL above 0.01 nats in step 0 or 1",
        "In step {first}, {key} is {value} already. Before the first update, policy and reference should be the same "
        "model, and their KL near 0.",
        "Check the reference: another checkpoint, the base model under a LoRA adapter that was trained before, "
        "dropout, another dtype, temperature or attention. It is normal if the policy starts from another model than "
        "the reference, if a step holds several updates in which the policy moves far, or if the KL is a sum over "
        "tokens.",
        f"{FAQ}, the KL is large at step 1; trl#3500, trl#3194; the limit is a rule of thumb",
    ),
    Rule(
        "kl-rising", ("kl/value", "kl/exact", "@kl"), "warning", facts.rising, 2.0,
        "KL at the end at least twice its median of the first half",
        "{key} rises after step {first}, from {before} to {value}, and does not level off.",
        "A KL under control rises and then levels off. Raise beta, lower the learning rate, or use fresher data; look "
        "at kl/floor_frac and kl/ess for stale data.",
        f"{CHOOSE}; the factor is a rule of thumb",
    ),
    Rule(
        "kl-spikes", ("kl/value", "kl/exact", "@kl"), "note", facts.spikes, 10.0,
        "KL above ten times its median, in at most a tenth of all steps",
        "{when}, {key} spikes to as much as {value}; its median is {before}.",
        "Single tokens with a large ratio do this. Look at kl/weight/max and kl/coef/max in these steps: cap:2 bounds "
        "the weight, and the coefficient of k2 grows more slowly than that of k3.",
        f"{FAQ}, the KL spikes; the factor is a rule of thumb",
    ),
    Rule(
        "native-kl-zero", ("@kl",), "warning", facts.always_zero, 0.0,
        "the framework's own KL is 0 in all of at least 3 steps",
        "{when}, {key} is exactly 0.",
        "No reference was loaded, or the policy does not change: check beta, the switch of the KL and the learning "
        "rate.",
        f"{FAQ}, the KL is 0 all the time; trl#4040",
    ),
    Rule(
        "weights-below-floor", ("kl/floor_frac",), "warning", facts.above, MOST_FLOORED,
        "kl/floor_frac above 0.5, lasting or in a tenth of all steps",
        "{when}, half of all weights or more are below the floor (median of {key}: {value}). The gradient of those "
        "tokens is no longer corrected.",
        "Make fewer updates per rollout, use a smaller learning rate, or use exact@loss. With floor:1 this is normal, "
        "because half of the weights are below 1 on fresh data from an inexact sampler.",
        'docs: "Unbiased is not the same as stable"',
    ),
    Rule(
        "low-ess", ("kl/ess",), "warning", facts.below, 0.8,
        "kl/ess below 0.8, lasting or in a tenth of all steps",
        "{when}, the weights' effective sample size is low: the data are worth a share of {value} of their tokens "
        "(median of {key}).",
        "The data are far from the policy. Make fewer updates per rollout, or use a smaller learning rate. If it is "
        "low in the first update of a rollout, check the engine's temperature, top-p, top-k and precision.",
        f"{CHOOSE}: a rule of thumb from the study, where runs that ran away had 0.21 to 0.64",
    ),
    Rule(
        "weight-mean", ("kl/weight/mean",), "warning", facts.off_one, 0.1,
        "kl/weight/mean more than 0.1 away from 1, lasting or in a tenth of all steps",
        "{when}, the mean weight is {value} (median of {key}). Under an exact weight it is 1 in expectation.",
        "The log-probs are not those of the policy that drew the tokens: truncated sampling, another temperature, or "
        "quantised weights in the engine; or the data are so stale that few tokens carry the mean. A cap lowers the "
        "mean as well.",
        f"{FAQ}, the weights are poor although the data are fresh; the limit is a rule of thumb",
    ),
    Rule(
        "large-weight", ("kl/weight/max",), "note", facts.above, 20.0,
        "kl/weight/max above 20, lasting or in a tenth of all steps",
        "{when}, single tokens have very large weights (median of {key}: {value}).",
        "Check the sampling settings; cap:2 in the spec bounds the weight, and fresher data remove the cause.",
        f"{CHOOSE}; the limit is a rule of thumb",
    ),
    Rule(
        "dead", ("kl/dead_frac",), "warning", facts.above, 0.01,
        "kl/dead_frac above 0.01, lasting or in a tenth of all steps",
        "{when}, a share of {value} of all tokens has no gradient although policy and reference differ (median of "
        "{key}).",
        "A cap, band or clip in the spec removes it. Leave the option out, or use a floor, which keeps a pull.",
        f"{CHOOSE}: healthy is 0",
    ),
    Rule(
        "capped", ("kl/cap_frac",), "note", facts.above, 0.25,
        "kl/cap_frac above 0.25, lasting or in a tenth of all steps",
        "{when}, cap, band or clip change the weight or coefficient of a share of {value} of all tokens (median of "
        "{key}).",
        "These options are meant for few tokens. Use fresher data, or a wider limit.",
        "rule of thumb",
    ),
    Rule(
        "estimators-disagree", ("kl/disagree",), "note", facts.above, 1.0,
        "kl/disagree above 1, lasting or in a tenth of all steps",
        "{when}, the means of k1 and k3 differ by more than the KL itself (median of {key}: {value}). On fresh data "
        "both have the same expectation.",
        "The data are stale, the sampler is not the policy, or a step has few tokens. kl/exact, under exact@loss, has "
        "no such noise.",
        f"{FAQ}, the KL is negative; the limit is a rule of thumb",
    ),
    Rule(
        "spread-coefficient", ("kl/coef/std",), "note", facts.above, 3.0,
        "kl/coef/std above 3, lasting or in a tenth of all steps",
        "{when}, the coefficients of the tokens spread widely (median of {key}: {value}), so single tokens dominate "
        "the gradient.",
        "The coefficient of k3 has no lower bound. k2@loss grows only with the log-ratio, jsd@loss half as fast.",
        f"{FAQ}, the KL spikes: in the demo it was 3 to 194 with k3 and 1.0 with k2",
    ),
    Rule(
        "beyond-bound", ("kl/log_ratio/max",), "warning", facts.ever_at_least, DEFAULT_BOUND,
        f"kl/log_ratio/max at {DEFAULT_BOUND:g} nats or more in any step",
        "{when}, a token's log-ratio reached {value} nats ({key}), where kl-plugins limits it inside an exponential.",
        "Policy and reference share almost nothing on this token. Look at kl/log_ratio/mean: if it is large as well, "
        "the run has diverged, or the reference is another model.",
        f"{FAQ}, the KL is NaN or infinite: the default of bound:",
    ),
    Rule(
        "observed", ("kl/observed",), "note", facts.above, 0.0,
        "kl/observed is logged",
        "{when}, the spec was measured and not applied ({key}): the run trained with the framework's own KL, and the "
        "findings about weights and coefficients say what the spec would have done.",
        "To train with the spec, write it without observe.",
        'docs: "Observe a run"',
    ),
    Rule(
        "observed-partly", ("kl/observed",), "warning", facts.ever_below, 0.999,
        "kl/observed below 1 in any step",
        "{when}, the observed spec could not be computed on all tokens ({key} {value}).",
        "Log-probs were missing or not finite there. If the spec weights by the sampler's log-probs, check that the "
        "engine returns them.",
        'docs: "Observe a run"',
    ),
    Rule(
        "host-clamped", ("kl/probe/host/dead_frac",), "warning", facts.above, 0.01,
        "kl/probe/host/dead_frac above 0.01, lasting or in a tenth of all probes",
        "{when}, the framework's own KL gives no gradient to a share of {value} of all tokens, although policy and "
        "reference differ there (median of {key}): its clamps hold the value.",
        "These are the tokens on which policy and reference differ most. Use a spec of kl-plugins, whose clamps act on "
        "values and never on gradients.",
        'docs: "Explain a config", the rules about clamps; the limit is a rule of thumb',
    ),
    Rule(
        "beta-limit", ("kl/beta", "@beta"), "error", facts.ever_at_least, LARGEST_BETA,
        f"beta at {LARGEST_BETA:g}, the largest value that a controller sets",
        "{when}, beta is at its largest value ({value}): the controller's target cannot be reached.",
        "Raise the target of the controller, or find out why the policy cannot come back to the reference.",
        "kl_plugins.controllers.LARGEST_BETA",
    ),
    Rule(
        "beta-stuck", ("kl/beta", "@beta"), "note", facts.stuck, 0.1,
        "beta moved, and then stays at its largest or smallest value in at least the last tenth of the log",
        "{when}, beta stays at {value}, the end of the range in which it moved before.",
        "A schedule that has ended looks like this and is normal. A controller that stays there cannot reach its "
        "target: change the target or the limits.",
        "rule of thumb",
    ),
    Rule(
        "beta-zero", ("kl/beta", "@beta"), "warning", facts.zeros, 0.0,
        "beta is 0, lasting or in a tenth of all steps",
        "{when}, beta is 0, so the KL has no effect.",
        "Under beta:dual a KL below the target does this. Otherwise set beta.",
        "kl_plugins.controllers: beta:dual is never negative",
    ),
    Rule(
        "reward-fallen", ("@reward",), "warning", facts.fallen, 0.5,
        "the reward lost more than half of what it had gained, beyond its noise",
        "{key} has fallen since step {first}, from {before} to {value}.",
        "Compare with the KL and kl/ess around that step. With stale data see the page on stability.",
        f"{FAQ}, my reward collapses when rollouts are stale; the limit is a rule of thumb",
    ),
)  # fmt: skip
"""All rules, by subject."""
