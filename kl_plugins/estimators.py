"""The one table of sampled KL estimators: each row's value and gradient coefficient.

Every function takes two views of the log-ratio ``u = logp - ref_logp`` (nats), elementwise:
``u`` for linear and quadratic uses, ``x`` clamped to the spec's bound for uses inside an ``exp``;
``delta = exp(-x)`` is ref/policy. Only tensor methods are used, so importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, get_args

from kl_plugins.f_divergences import Elementwise, alpha_coefficient, alpha_value, derive_from_f, jsd_value
from kl_plugins.spec.grammar import ESTIMATOR_NAME, format_number, parse_number

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINT_GROUP = "kl_plugins.estimators"

Kind = Literal["reverse_kl", "forward_kl", "other_f", "none"]


@dataclass(frozen=True)
class Estimator:
    """One row: a sampled estimator of a divergence between policy and reference.

    Attributes:
        name: the word in the spec.
        value: k_t, in nats.
        coefficient: what multiplies grad log pi(a_t|s_t) in the loss gradient.
        kind: the divergence whose per-state gradient the coefficient has in expectation.
        is_f_divergence: whether ``value`` is f(delta), so that it can serve as its own future term.
        value_formula, coefficient_formula: for ``explain``.
        source: where the row comes from.
        restoring: whether the coefficient has the sign of u and is 0 at u = 0. Then any positive factor on it leaves
            u = 0 the only point without a force; ``floor:`` needs that.
        keeps_pull: whether the coefficient times the policy's probability p stays away from 0 as p goes to 0. Then an
            importance weight leaves a pull on a token that the policy has all but dropped. None: not known.
    """

    name: str
    value: Elementwise
    coefficient: Elementwise
    kind: Kind
    value_formula: str
    coefficient_formula: str
    source: str
    is_f_divergence: bool = False
    restoring: bool = False
    keeps_pull: bool | None = None


def k3_value(u: Tensor, x: Tensor) -> Tensor:
    """Value of k3: delta - 1 - log delta >= 0. See Schulman 2020, "Approximating KL divergence"."""
    # maximum: below -bound the linear part stops with the exponential one, so that the value stays >= 0.
    return ((-x).expm1() + u.maximum(x)).clamp_min(0.0)


def _one(u: Tensor, x: Tensor) -> Tensor:
    return u * 0.0 + 1.0


_SCHULMAN = "Schulman 2020, Approximating KL divergence"
_GRADIENT = "arXiv 2510.01555"
_FRPO = "arXiv 2601.10201, Theorem 4.1"

_TABLE: dict[str, Estimator] = {
    row.name: row
    for row in (
        Estimator("k1", lambda u, x: u, _one, "none", "u", "1", f"{_SCHULMAN}; {_GRADIENT}", keeps_pull=False),
        Estimator(
            "k2",
            lambda u, x: u.square() / 2,
            lambda u, x: u,
            "reverse_kl",
            "u^2/2",
            "u",
            f"{_SCHULMAN}; {_GRADIENT}, Theorem 5.1",
            restoring=True,
            keeps_pull=False,
        ),
        Estimator(
            "k3",
            k3_value,
            lambda u, x: -(-x).expm1(),
            "forward_kl",
            "delta - 1 + u",
            "1 - delta",
            f"{_SCHULMAN}; {_GRADIENT}",
            restoring=True,
            keeps_pull=True,
        ),
        Estimator(
            "k3+",
            k3_value,
            lambda u, x: u,
            "reverse_kl",
            "delta - 1 + u",
            "u",
            _GRADIENT,
            restoring=True,
            keeps_pull=False,
        ),
        Estimator(
            "abs",
            lambda u, x: u.abs(),
            lambda u, x: u.sign(),
            "other_f",
            "|u|",
            "sign u",
            _FRPO,
            restoring=True,
            keeps_pull=False,
        ),
        Estimator(
            "jeffreys",
            lambda u, x: -u * (-x).expm1(),
            lambda u, x: u - (-x).expm1(),
            "other_f",
            "u (1 - delta)",
            "u + 1 - delta",
            _FRPO,
            is_f_divergence=True,
            restoring=True,
            keeps_pull=True,
        ),
        Estimator(
            "jsd",
            jsd_value,
            lambda u, x: ((-x).expm1() / 2).log1p() / -2,
            "other_f",
            "(delta log(2 delta/(1+delta)) - log((1+delta)/2))/2",
            "-log((1+delta)/2)/2",
            _FRPO,
            is_f_divergence=True,
            restoring=True,
            keeps_pull=False,
        ),
        Estimator(
            "hellinger",
            lambda u, x: (-x / 2).expm1().square(),
            lambda u, x: -(-x / 2).expm1(),
            "other_f",
            "(1 - sqrt delta)^2",
            "1 - sqrt delta",
            _FRPO,
            is_f_divergence=True,
            restoring=True,
            keeps_pull=False,
        ),
        Estimator(
            "chi2",
            lambda u, x: (-x).expm1().square() / 2,
            lambda u, x: -(-2 * x).expm1() / 2,
            "other_f",
            "(delta - 1)^2/2",
            "(1 - delta^2)/2",
            _FRPO,
            is_f_divergence=True,
            restoring=True,
            keeps_pull=True,
        ),
        # Only its future term and its sampled stand-in live here; the full-vocabulary value is passed in.
        Estimator(
            "exact",
            lambda u, x: u,
            lambda u, x: u,
            "reverse_kl",
            "sum_a pi(a) log(pi(a)/ref(a))",
            "exact gradient of KL_t",
            "arXiv 2504.10637 (Rao-Blackwellised)",
        ),
    )
}

BUILT_IN = tuple(_TABLE)
"""Names that ship with kl-plugins; ``alpha-<a>`` comes on top."""


_ALPHAS: dict[str, Estimator] = {}


def _alpha(a: float) -> Estimator:
    # A dict rather than functools.cache: torch.compile traces through lookups, and warns at cached functions.
    name = f"alpha-{format_number(a)}"
    if name not in _ALPHAS:
        _ALPHAS[name] = _alpha_row(name, a)
    return _ALPHAS[name]


def _alpha_row(name: str, a: float) -> Estimator:
    return Estimator(
        name,
        partial(alpha_value, a),
        partial(alpha_coefficient, a),
        "forward_kl" if a == 1 else "other_f",
        "delta log delta - delta + 1" if a == 1 else f"(delta^a - a delta + a - 1)/(a (a-1)), a = {format_number(a)}",
        f"(1 - delta^a)/a, a = {format_number(a)}",
        _FRPO,
        is_f_divergence=True,
        restoring=True,
        keeps_pull=a >= 1,
    )


def register_estimator(
    name: str,
    *,
    f: Callable[[Tensor], Tensor] | None = None,
    value: Elementwise | None = None,
    coefficient: Elementwise | None = None,
    kind: Kind | None = None,
    value_formula: str = "user-defined",
    coefficient_formula: str = "user-defined",
    source: str = "user-defined",
    restoring: bool = False,
    keeps_pull: bool | None = None,
) -> Estimator:
    """Add one estimator row, so that ``name`` becomes a word of the KL spec.

    See arXiv 2601.10201, Theorem 4.1, for the coefficient that follows from f.

    Args:
        name: matches ``[a-z][a-z0-9.+_-]*`` and is not taken.
        f: an f-divergence as a function of delta = ref/policy; value and coefficient follow from it.
        value: k_t from (u, x), in nats; instead of ``f``.
        coefficient: what multiplies grad log pi, from (u, x); instead of ``f``.
        kind: the divergence whose gradient this is; ``other_f`` with ``f``, else ``none`` unless you say so.
        value_formula: shown by ``kl-plugins explain``.
        coefficient_formula: shown by ``kl-plugins explain``.
        source: paper or page, shown by ``kl-plugins explain``.
        restoring: the coefficient has the sign of u and is 0 at u = 0, which ``floor:`` needs. It is so for every f
            that is strictly convex at 1, but this is not checked.
        keeps_pull: exp(u) times the coefficient stays away from 0 as u goes to minus infinity; for ``kl-plugins
            explain``.

    Returns:
        The new row.

    Raises:
        ValueError: a bad or taken name, an unknown kind, or not exactly one of ``f`` and (``value`` and
            ``coefficient``).
    """
    if not ESTIMATOR_NAME.fullmatch(name) or name.startswith("alpha-"):
        raise ValueError(f"estimator name {name!r} must match {ESTIMATOR_NAME.pattern} and not start with 'alpha-'")
    if name in _TABLE:
        raise ValueError(f"estimator {name!r} is already registered; choose another name")
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"estimator {name!r}: kind {kind!r} is none of {', '.join(get_args(Kind))}")
    if f is not None:
        if value is not None or coefficient is not None:
            raise ValueError(f"estimator {name!r}: give f, or value and coefficient, not both")
        value, coefficient = derive_from_f(f)
    if value is None or coefficient is None:
        raise ValueError(f"estimator {name!r}: give f, or both value and coefficient")
    row = Estimator(
        name,
        value,
        coefficient,
        kind or ("other_f" if f is not None else "none"),
        value_formula,
        coefficient_formula,
        source,
        is_f_divergence=f is not None,
        restoring=restoring,
        keeps_pull=keeps_pull,
    )
    _TABLE[name] = row
    return row


@cache
def _load_entry_points() -> None:
    # Each entry point names a callable without arguments that calls register_estimator.
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()()
        except Exception as error:
            owner = point.dist.name if point.dist else "unknown"
            raise RuntimeError(
                f"entry point {point.name!r} = {point.value!r} of package {owner!r} ({ENTRY_POINT_GROUP}) failed: "
                f"{type(error).__name__}: {error}. Repair or uninstall that package."
            ) from error


def find_estimator(name: str) -> Estimator | None:
    """The row called ``name`` (``alpha-<a>`` included), or None. Third-party entry points are loaded only on a miss."""
    if row := _TABLE.get(name) or _ALPHAS.get(name):
        return row
    if name.startswith("alpha-"):
        a = parse_number(name.removeprefix("alpha-"))
        return _alpha(a) if a else None
    _load_entry_points()
    return _TABLE.get(name)


def all_estimators() -> Iterator[Estimator]:
    """Every registered row, built-in ones first."""
    _load_entry_points()
    yield from _TABLE.values()
