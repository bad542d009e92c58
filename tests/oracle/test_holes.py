"""Masked columns inside a response (tool output) or before it (prompt) are as if they were not there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins import kl_penalty, kl_term
from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import full_vocabulary_kl, padded, penalty_for, term_for
from tests.support.oracle.problems import TOLERANCE, problems
from tests.support.oracle.specs import ADVANTAGES, LOSSES, REWARDS, parse

EXTRA = [
    "k2@loss/horizon:sequence/gamma:0.7/is:decision/cap:1.2",
    "k2@loss/is:prefix/band:0.8-1.3/norm",
    "k2@loss/horizon:sequence/clip:0.1/allow:biased",
    "k1@advantage/gamma:0.7",
]


def widened(values: Tensor, fill: float | bool) -> Tensor:
    """Two columns in front, one after the first token, three after the second."""
    filled = torch.full_like(values[:, :1], fill)
    first, second, rest = values[:, :1], values[:, 1:2], values[:, 2:]
    return torch.cat([filled, filled, first, filled, second, filled, filled, filled, rest], 1)


def kept(problem: Problem) -> Tensor:
    """The columns of a widened tensor that came from the original."""
    return widened(torch.ones(1, problem.length), 0.0)[0].bool()


@pytest.mark.parametrize("text", LOSSES + REWARDS + ADVANTAGES + EXTRA)
def test_holes_change_nothing(text: str) -> None:
    spec = parse(text)
    for problem in problems():
        columns, mask = kept(problem), widened(problem.mask, False)
        logp, ref_logp, sampler_logp = (
            widened(padded(problem, problem.log_probs(name).detach()), float("nan"))
            for name in ("current", "reference", "sampler")
        )
        exact = widened(full_vocabulary_kl(problem).detach(), float("nan")) if spec.needs_exact else None
        if spec.placement == "loss":
            term = kl_term(spec, logp, ref_logp, mask, sampler_logp=sampler_logp, exact=exact)
            plain = term_for(spec, problem, "sampler")
            pairs = [(term.coefficient, plain.coefficient), (term.weight, plain.weight), (term.value, plain.value)]
        else:
            pairs = [(kl_penalty(spec, logp, ref_logp, mask, exact=exact), penalty_for(spec, problem))]
        for with_holes, without in pairs:
            response = with_holes[:, columns] * problem.mask
            torch.testing.assert_close(response, (without * problem.mask).detach(), rtol=TOLERANCE, atol=1e-13)
            assert not with_holes[:, ~columns].any()
