"""The problems that every oracle test runs on, built once."""

from __future__ import annotations

from functools import cache

import torch

from tests.support.oracle.enumeration import Problem, make_problem

torch.set_num_threads(1)

TOLERANCE = 1e-9
"""Largest relative error that counts as equal."""

MARGIN = 1e-3
"""Smallest relative error that counts as different: six orders of magnitude above the tolerance."""


@cache
def problems() -> tuple[Problem, ...]:
    """Two to four tokens, three to five positions, fixed and stopping responses.

    With two positions the only future term is fixed by the first token, and prefix weights would look sufficient.
    """
    return (
        make_problem(3, 3, seed=1),
        make_problem(4, 3, seed=2),
        make_problem(2, 5, seed=3),
        make_problem(3, 4, seed=4, stops=True),
    )


@cache
def bandit() -> Problem:
    """One position: a sequence is one action."""
    return make_problem(6, 1, seed=5)
