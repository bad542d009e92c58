"""The table of sampled KL estimators; each row has a value and a gradient coefficient.

The functions of a row work elementwise and take the log-ratio ``u = logp - ref_logp`` (nats) twice. The first argument,
``u``, is for linear and quadratic uses. The second one, ``x``, is clamped to the spec's bound and is for uses inside an
``exp``, so that the result stays finite. ``delta = exp(-x)`` is the probability ratio reference/policy. The functions
use tensor methods only, so importing this module does not import torch.
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
    """A sampled estimator of a divergence between policy and reference; one row of the table.

    ``value`` and ``coefficient`` are functions of (u, x), two tensors of the same shape, and return a tensor of that
    shape. The documentation of this module defines u, x and delta.

    Attributes:
        name: the word that names the estimator in a spec.
        value: gives k_t, the estimate of the divergence at each token, in nats.
        coefficient: gives the factor of grad log pi(a_t|s_t) in the gradient of the loss.
        kind: the divergence whose gradient, state by state, is the expectation of coefficient times grad log pi.
        is_f_divergence: whether ``value`` is f(delta). If so, ``value`` also is the future term (``future:own``).
        value_formula, coefficient_formula: the formulas that ``kl-plugins explain`` shows.
        source: the paper or page that the row comes from.
        restoring: whether the coefficient has the sign of u and is 0 at u = 0. If so, the gradient of the term vanishes
            only at u = 0, also after multiplication by any positive weight. The option ``floor:`` requires this.
        keeps_pull: whether the coefficient times the policy's probability p stays away from 0 as p goes to 0. If so,
            a token that the policy has nearly dropped is still pulled back under an exact importance weight. None if
            this is not known.
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
    """Value of the estimator k3, delta - 1 - log delta >= 0, in nats; elementwise.

    See Schulman 2020, "Approximating KL divergence".

    Args:
        u: log-ratios, nats, any shape.
        x: the same log-ratios, clamped for use inside an ``exp``.

    Returns:
        The values, in the shape and dtype of ``u``.
    """
    # Below -bound the exponential part is constant. The maximum makes the linear part constant there as well; otherwise
    # the value would become negative.
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
        # This row has the sampled form of exact, for its future term and for @advantage. The value over the whole
        # vocabulary is an argument of kl_term.
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
"""Names of the rows that ship with kl-plugins; the family ``alpha-<a>`` is available in addition."""

_ALPHAS: dict[str, Estimator] = {}


def _alpha(a: float) -> Estimator:
    # A dict is used instead of functools.cache, because torch.compile traces dict look-ups and warns about caches.
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
    """Register an estimator, so that specs can use ``name``.

    Give either ``f``, or both ``value`` and ``coefficient``. With ``f``, value and coefficient follow from arXiv
    2601.10201, Theorem 4.1. All functions work elementwise on tensors and use torch operations only.

    Args:
        name: the word in a spec. It matches ``[a-z][a-z0-9.+_-]*``, does not begin with ``alpha-``, and is not
            registered yet.
        f: generator of an f-divergence, a convex function of delta = reference/policy with f(1) = 0.
        value: function of (u, x) that gives the estimate k_t of each token, in nats. u is the log-ratio policy over
            reference in nats; x is u, clamped to the spec's bound, for use inside an ``exp``. Both have shape (B, T),
            and so has the result.
        coefficient: function of (u, x) that gives the factor of grad log pi in the gradient of the loss, of shape
            (B, T).
        kind: the divergence whose gradient the coefficient gives in expectation: ``reverse_kl``, ``forward_kl``,
            ``other_f`` or ``none``. The default is ``other_f`` with ``f``, and ``none`` otherwise.
        value_formula: formula of the value, shown by ``kl-plugins explain``.
        coefficient_formula: formula of the coefficient, shown by ``kl-plugins explain``.
        source: paper or page, shown by ``kl-plugins explain``.
        restoring: whether the coefficient has the sign of u and is 0 at u = 0; the option ``floor:`` requires this.
            It is true for every f that is strictly convex at 1, but it is not checked.
        keeps_pull: whether exp(u) times the coefficient stays away from 0 as u goes to minus infinity. ``kl-plugins
            explain`` uses it to describe the spec under stale data. None if this is not known.

    Returns:
        The new row.

    Raises:
        ValueError: The name is malformed or taken, the kind is unknown, or the arguments are not exactly one of ``f``
            and the pair of ``value`` and ``coefficient``.
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
    # Each entry point names a callable that takes no arguments and calls register_estimator.
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
    """Return the estimator called ``name``, or None if there is none.

    Entry points of other packages are loaded only if the table has no row of that name.

    Args:
        name: the word in a spec; ``alpha-<a>`` is accepted for every a > 0.

    Returns:
        The row, or None.

    Raises:
        RuntimeError: The entry point of another package failed.
    """
    if row := _TABLE.get(name) or _ALPHAS.get(name):
        return row
    if name.startswith("alpha-"):
        a = parse_number(name.removeprefix("alpha-"))
        return _alpha(a) if a else None
    _load_entry_points()
    return _TABLE.get(name)


def all_estimators() -> Iterator[Estimator]:
    """Yield every registered estimator, the built-in ones first; the family ``alpha-<a>`` is not included.

    Raises:
        RuntimeError: The entry point of another package failed.
    """
    _load_entry_points()
    yield from _TABLE.values()
