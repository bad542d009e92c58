"""Formulas of a spec as text: value, weight, and coefficient or penalty, exactly as the kernels apply them."""

from __future__ import annotations

import re

from kl_plugins.estimators import Estimator, find_estimator
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import format_number
from kl_plugins.spec.options import OPTIONS

BUCKET = "sum_S p log(p / r) + P L, with p of the policy, r of the reference"
"""Value of ``exact`` with ``top:``: the KL over the set and one bucket."""

UNSTATED = "user-defined"
"""Text instead of a formula, if the author of a registered estimator gave none."""


def row_of(spec: KLSpec) -> Estimator:
    """Return the estimator row that a parsed spec names."""
    row = find_estimator(spec.estimator)
    if row is None:
        raise LookupError(f"estimator {spec.estimator!r} is not registered in this process")
    return row


def formulas(spec: KLSpec) -> dict[str, str]:
    """Return the formulas by name, in reading order. ``coefficient`` or ``penalty`` determines the gradient.

    Args:
        spec: a parsed spec.

    Returns:
        For ``@loss``: ``value``, ``weight`` and ``coefficient``; otherwise ``value``, ``penalty`` and ``score``.
        ``symbols`` comes last.
    """
    lines = {"value": f"k_t = {_value(spec)}"}
    lines |= _loss_lines(spec) if spec.placement == "loss" else _score_lines(spec)
    return {**lines, "symbols": _symbols(spec, " ".join(lines.values()))}


def _value(spec: KLSpec) -> str:
    if spec.estimator == "exact":
        return "KL_t" if spec.top is None else BUCKET
    formula = row_of(spec).value_formula
    return UNSTATED if formula == UNSTATED else _at(formula, "t", "k")


def _loss_lines(spec: KLSpec) -> dict[str, str]:
    lines = {}
    weight = _weight(spec)
    if weight:
        lines["weight"] = weight
    own = _at(row_of(spec).coefficient_formula, "t", "own")
    future = _future_sum(spec, "w_j " if spec.correction == "decision" else "")
    if spec.estimator == "exact":
        over = "the whole vocabulary" if spec.top is None else "the set S and the bucket"
        exact_weight = _exact_weight(spec)
        lines["own term"] = f"{exact_weight}grad {'KL_t' if spec.top is None else 'k_t'}, differentiated over {over}"
        own = "" if spec.top is None else "v_t"
    if spec.clip is not None:
        interval = f"{1 - spec.clip:.12g}, {1 + spec.clip:.12g}"
        lines["clipped head"] = (
            f"max(rho_t k'_t, clip(rho_t, {interval}) k'_t) with k'_t = {_sum(own, future)}, detached"
        )
        lines["coefficient"] = "c_t = rho_t k'_t where that is the larger of the two, else 0"
    elif spec.correction == "decision":
        lines["coefficient"] = f"c_t = {_sum(own and f'w_t {_group(own)}', future)}"
    else:
        inner = _sum(own, future)
        lines["coefficient"] = f"c_t = {f'w_t {_group(inner)}' if weight and inner != '0' else inner}"
    lines["coefficient"] += "; it multiplies grad log policy(token t), nothing else does"
    if spec.estimator == "exact":
        lines["coefficient"] = lines["coefficient"].replace("nothing else does", "beside the own term")
    return lines


def _score_lines(spec: KLSpec) -> dict[str, str]:
    if spec.placement == "reward":
        return {
            "penalty": "p_t = k_t, subtracted from the reward as r_t - beta p_t",
            "score": "where the return is the plain sum of later rewards, token t is scored with sum_{j>=t} p_j",
        }
    sampled = spec.estimator in ("k1", "exact")
    own = "u_t" if sampled else "k_t"
    penalty = _sum(own, _future_sum(spec, ""))
    return {
        "penalty": f"p_t = {penalty}, subtracted from the advantage as A_t - beta p_t, after normalisation",
        "score": "p_t multiplies grad log policy(token t) in the host's policy-gradient term, under its ratio and clip",
    }


def _weight(spec: KLSpec) -> str:
    if not spec.needs_behaviour or spec.clip is not None:
        return ""  # The formula of the clipped head already contains its ratio.
    own_is_exact = spec.estimator == "exact" and spec.top is None
    text = {
        "token": "rho_t",
        "prefix": "rho_{1:t-1}" if own_is_exact else "rho_{1:t}",
        "sequence": "rho_{1:T}",
        "decision": "rho_{1:t-1}" if own_is_exact else "rho_{1:t}",
    }[spec.correction]
    for row in OPTIONS.values():
        if row.weight is not None and row.is_set(spec):
            text = row.weight(row.value(spec), text)
    line = f"w_t = {text}; detached"
    if spec.top is not None:
        if spec.correction in ("prefix", "decision"):
            line += "; w'_t of set and bucket is the same with rho_{1:t-1}"
    elif spec.correction == "decision" and (spec.future == "exact") is not own_is_exact:
        line += f"; w_j of a future term is the same with rho_{{1:{'j-1' if spec.future == 'exact' else 'j'}}}"
    return line


def _exact_weight(spec: KLSpec) -> str:
    """Return the weight of the own term's gradient. With ``top:``, it ends one token before the sampled part's."""
    if not spec.needs_behaviour or (spec.top is not None and spec.correction == "token"):
        return ""
    return "w_t " if spec.top is None or spec.correction == "sequence" else "w'_t "


def _future_sum(spec: KLSpec, weight: str) -> str:
    if spec.horizon == "token":
        return ""
    if spec.future == "exact" and spec.top is not None:
        discount = "" if spec.gamma == 1 else f"{format_number(spec.gamma)}^(j-t) "
        terms = "w'_j k_j + w_j v_j" if weight else "k_j + v_j"
        return f"sum_{{j>t}} {discount}({terms})"
    term = {"k1": "u_j", "k3": "(delta_j - 1 + u_j)", "exact": "KL_j"}.get(spec.future or "")
    term = term or _group(_at(row_of(spec).value_formula, "j", "k"))
    discount = "" if spec.gamma == 1 else f"{format_number(spec.gamma)}^(j-t) "
    return f"sum_{{j>t}} {discount}{weight}{term}"


def _symbols(spec: KLSpec, used: str) -> str:
    legend = ["u_t = log policy - log reference of token t, in nats"]
    if "delta_" in used:
        legend.append("delta_t = exp(-u_t)")
    if "rho_" in used:
        behaviour = {None: "behaviour", "sampler": "sampler", "old": "old policy"}[spec.behaviour]
        legend.append(f"rho_t = policy/{behaviour}, rho_{{1:t}} its product over response tokens")
    if spec.top is not None:
        legend += [
            f"S: the reference's {spec.top} most probable tokens; P and R: what policy and reference leave outside S; "
            "L = log(P / R)",
            "v_t = u_t - L where token t is not in S, else 0"
            if spec.draws is None
            else "v_t = s_t (u_t - L) where token t is not in S, else 0; s = p / (p + m r) of a token with probability "
            f"p under the policy and r in a draw; m = {spec.draws} draws b of the reference add s_b (u_b - L) to k_t, "
            "with the gradient s_b (u_b - L) grad log p_b",
        ]
    if "KL_" in used:
        legend.append("KL_t = sum_a policy(a) log(policy(a)/reference(a))")
    return "; ".join(legend)


def _at(formula: str, index: str, unstated: str) -> str:
    """Add a token index to ``u`` and ``delta`` of the table's formula, and replace ``a`` by its number."""
    if formula == UNSTATED:
        return f"{unstated}_{index} ({UNSTATED})"
    body, _, a = formula.partition(", a = ")
    return re.sub(r"\b(u|delta)\b", rf"\1_{index}", re.sub(r"\ba\b", a, body) if a else body)


def _group(text: str) -> str:
    return f"({text})" if " + " in text or " - " in text or "sum_" in text or text.startswith("-") else text


def _sum(own: str, future: str) -> str:
    return " + ".join(part for part in (own, future) if part) or "0"
