"""Rules that hold in every host, because they follow from the KL term and not from the host's code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.explained.rules import ALL_HOSTS, Rule
from kl_plugins.adapters.explained.run import ConfiguredRun, Term, as_number
from kl_plugins.aggregation import SEQUENCE_MEAN_CAVEAT
from kl_plugins.explain.bias import why_none
from kl_plugins.explain.stability import stability
from kl_plugins.sampling import EFFECTS
from kl_plugins.settings import Setting, Unknown

Holds = Callable[[Term], bool]

_KL = re.compile(r"(^|[._-])(kl|kld)([._-]|$)", re.IGNORECASE)


def some(holds: Holds) -> Callable[[ConfiguredRun], bool]:
    """Return a condition: the run has a term for which ``holds`` is true."""
    return lambda run: any(holds(term) for term in run.terms)


def keys_of(holds: Holds) -> Callable[[ConfiguredRun], Iterator[str]]:
    """Return a function that gives the settings of the terms for which ``holds`` is true."""
    return lambda run: (key for term in run.terms if holds(term) for key in term.keys)


def first(run: ConfiguredRun, holds: Holds) -> Term:
    """Return the first term of a run for which ``holds`` is true."""
    return next(term for term in run.terms if holds(term))


def k1_in_loss(term: Term) -> bool:
    """Whether it is a host's own k1 as a loss."""
    return term.native and term.in_loss and term.spec.estimator == "k1" and term.spec.horizon == "token"


def without_target(term: Term) -> bool:
    """Whether it is a spec that has the gradient of no divergence."""
    return not term.native and term.spec.target == "none"


def plain_k3(term: Term) -> bool:
    """Whether it is a host's own k3 as a loss, without a weight."""
    return term.native and term.in_loss and term.spec.estimator == "k3" and not term.spec.needs_behaviour


def not_a_score(term: Term) -> bool:
    """Whether it is a host's own KL in the reward, of another estimator than k1."""
    return term.native and term.spec.placement == "reward" and term.spec.estimator != "k1"


def unweighted(term: Term) -> bool:
    """Whether stale data bias it for the lack of a weight."""
    return term.in_loss and not term.spec.needs_behaviour and not term.spec.needs_exact and not k1_in_loss(term)


def a_score(term: Term) -> bool:
    """Whether it is in the reward or in the advantages."""
    return not term.in_loss


def fades(term: Term) -> bool:
    """Whether its pull fades on tokens that the policy drops."""
    return term.in_loss and term.equal and term.spec.needs_behaviour and "can run away" in stability(term.spec)


def foreign_keys(run: ConfiguredRun) -> list[str]:
    """Return the settings whose names contain ``kl`` and that the host does not have."""
    return [setting.key for setting in run.settings if _KL.search(setting.key) and setting.key not in run.kl_keys]


def unknown_keys(run: ConfiguredRun) -> list[str]:
    """Return the settings that matter here and whose values are unknown, or no numbers where one belongs."""

    def unknown(setting: Setting) -> bool:
        assumed = run.defaults.get(setting.key)
        numeric = isinstance(assumed, (int, float)) and not isinstance(assumed, bool)
        return isinstance(setting.value, Unknown) or (numeric and as_number(setting.value) is None)

    return [s.key for s in run.settings if (s.key in run.defaults or s.key in run.kl_keys) and unknown(s)]


def measured(run: ConfiguredRun) -> str:
    """Return what the settings with ``observe`` of a run do, in words."""
    said = []
    for _, observation in run.observed.values():
        spec = "the spec that has the gradient of the run's own KL, or is nearest to it"
        if observation.spec is not None:
            spec = str(observation.spec)
        probe = "" if observation.probe is None else f", with a probe every {observation.probe} optimizer steps"
        said.append(f"observe changes nothing in training. It measures {spec} on the same tokens{probe}")
    return "; ".join(said)


def _by_response(term: Term) -> bool:
    return term.rule == "response"


def _beta_keys(run: ConfiguredRun) -> Iterator[str]:
    return (term.beta_key for term in run.terms if term.beta < 0)


COMMON: tuple[Rule[ConfiguredRun], ...] = (
    Rule(
        "k1-in-loss",
        ALL_HOSTS,
        "error",
        keys_of(k1_in_loss),
        some(k1_in_loss),
        lambda run: f"k1 as a loss does not regularise. {why_none(first(run, k1_in_loss).spec)}",
        "arXiv 2510.01555; arXiv 2512.21852",
        "use k2 as the loss, or the spec `default`",
    ),
    Rule(
        "spec-without-divergence",
        ALL_HOSTS,
        "warning",
        keys_of(without_target),
        some(without_target),
        lambda run: f"the spec is allowed to be biased, and it is. {why_none(first(run, without_target).spec)}",
        "arXiv 2510.01555; arXiv 2512.21852",
        "keep it for comparisons alone; the spec `default` regularises",
    ),
    Rule(
        "score-of-another-estimator",
        ALL_HOSTS,
        "error",
        keys_of(not_a_score),
        some(not_a_score),
        lambda run: f"{first(run, not_a_score).written} is no regulariser. {why_none(first(run, not_a_score).spec)}",
        "arXiv 2512.21852; theory: Which loss is which gradient",
        "use k1 in the reward, or the spec k1@advantage",
    ),
    Rule(
        "k3-is-forward-kl",
        ALL_HOSTS,
        "warning",
        keys_of(plain_k3),
        some(plain_k3),
        "k3 as a loss has the gradient of the forward KL, KL(reference || policy), although its value estimates the "
        "reverse KL. Its coefficient 1 - reference/policy is at most 1 where the policy prefers a token too much, and "
        "has no lower bound where the reference prefers it",
        "arXiv 2510.01555; arXiv 2506.09477",
        "use k2 as the loss, or the spec `default`, for the reverse KL; the spec k3@loss/is:token for the forward KL",
    ),
    Rule(
        "no-weight-on-stale-data",
        ALL_HOSTS,
        "warning",
        keys_of(unweighted),
        lambda run: run.staleness.stale and any(unweighted(term) for term in run.terms),
        lambda run: (
            f"the data are stale ({run.staleness.text}), and the KL has no importance weight: its gradient is "
            "averaged over tokens of an older policy, and is that of no divergence"
        ),
        "arXiv 2512.02556 (DeepSeek-V3.2); verl#2983; OpenRLHF#1309; theory: Off-policy data",
        "use the spec `default` (k2@loss/is:token/floor:0.5)",
    ),
    Rule(
        "weight-without-floor-on-stale-data",
        ALL_HOSTS,
        "warning",
        keys_of(fades),
        lambda run: run.staleness.stale and any(fades(term) for term in run.terms),
        lambda run: f"the data are stale ({run.staleness.text}). {stability(first(run, fades).spec)}",
        "docs: Unbiased is not the same as stable; arXiv 2602.17616",
        "use the spec `default` (k2@loss/is:token/floor:0.5)",
    ),
    Rule(
        "mean-per-response",
        ALL_HOSTS,
        "warning",
        lambda run: (first(run, _by_response).rule_key,),
        some(_by_response),
        lambda run: f"{first(run, _by_response).rule_setting}: {SEQUENCE_MEAN_CAVEAT}",
        "docs: Migration; arXiv 2503.20783 (Dr. GRPO)",
        "use an aggregation over tokens if the KL is to be that of the policy",
    ),
    Rule(
        "truncated-sampling",
        ALL_HOSTS,
        "warning",
        lambda run: (key for key in run.sampling_keys if run.given(key)),
        lambda run: bool(run.terms) and run.sampling.truncated,
        lambda run: (
            f"responses are sampled with {run.sampling}, so they come from another policy than the one whose "
            f"log-probs the KL uses ({EFFECTS})"
        ),
        "trl#6789; vllm#42259; tests/oracle/test_truncated_sampling.py",
        "sample the whole distribution: top_p 1, no top_k, no min_p",
    ),
    Rule(
        "score-behind-the-clip",
        ALL_HOSTS,
        "warning",
        keys_of(a_score),
        lambda run: run.staleness.stale and any(a_score(term) for term in run.terms),
        lambda run: (
            f"the data are stale ({run.staleness.text}), and this KL reaches the policy through the policy loss: "
            "where the ratio of a token is clipped, its KL has no gradient, also where it would pull the token back"
        ),
        "arXiv 1707.06347 (PPO); arXiv 2510.01555",
        "use a KL in the loss, for example the spec `default`",
    ),
    Rule(
        "observed",
        ALL_HOSTS,
        "note",
        lambda run: run.observed,
        lambda run: bool(run.observed),
        measured,
        "docs: Observe a run",
        "everything else on this page is about the host's own KL, under which the run trains",
    ),
    Rule(
        "negative-beta",
        ALL_HOSTS,
        "error",
        _beta_keys,
        lambda run: any(term.beta < 0 for term in run.terms),
        "a negative coefficient drives the policy away from the reference",
        "the sign of the term in the host's loss",
        "set a positive coefficient",
    ),
    Rule(
        "foreign-setting",
        ALL_HOSTS,
        "warning",
        foreign_keys,
        lambda run: bool(foreign_keys(run)),
        lambda run: (
            f"{run.name} has no setting {', '.join(foreign_keys(run))}, so it selects no KL: it is rejected or, "
            "by some programs, ignored"
        ),
        "the host's config and parser; slime#397 and unsloth-zoo#890 are silent cases in other programs",
        "remove it, or use the name that this host and version have",
        ignored=foreign_keys,
    ),
    Rule(
        "unknown-value",
        ALL_HOSTS,
        "note",
        unknown_keys,
        lambda run: bool(unknown_keys(run)),
        "the value is set elsewhere or is not a number where one belongs; the host's default is assumed",
        "the config itself",
        "give the resolved config, or add the value as one more argument",
    ),
    Rule(
        "version-not-checked",
        ALL_HOSTS,
        "note",
        (),
        lambda run: not SpecifierSet(run.host.supported).contains(run.version, prereleases=True),
        lambda run: (
            f"{run.name} is not among the versions whose sources were read ({run.host.supported}), so some "
            "statements may not hold for it"
        ),
        "kl-plugins doctor",
        "give another version with --version, if that is the one that you run",
    ),
)
"""The rules about every host."""
