"""Probes of an observed ``exact@loss/top``: gradients by the logits, in k + 1 cells per token."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec, RefTopK, exact_kl, kl_term, reference_top_k
from kl_plugins.adapters.metrics import Accumulator
from kl_plugins.adapters.observe import measured
from kl_plugins.probe import Cells, HostTerm, cells_of, probe_metrics, probe_sums

VOCABULARY, K = 7, 3


class States(NamedTuple):
    """A batch (B, T) of states with all logits of the policy, in float64, and tokens drawn by someone else."""

    logits: Tensor
    tokens: Tensor
    ref_logp: Tensor
    old: Tensor
    mask: Tensor
    reference: RefTopK

    def logp(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def cells(self) -> Cells:
        kept = self.logits.log_softmax(-1).gather(-1, self.reference.tokens)
        return cells_of(kept, self.tokens, self.reference)

    def in_cells(self, gradient: Tensor) -> Tensor:
        """Reduce a gradient (B, T, V) by the logits to one (B, T, k + 1) by the cells: kept tokens and the bucket."""
        kept = gradient.gather(-1, self.reference.ids)
        return torch.cat([kept, gradient.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)], -1)

    def by_logits(self, coefficient: Tensor) -> Tensor:
        """(B, T, V) gradient of a coefficient times the log-prob of each drawn token."""
        (gradient,) = torch.autograd.grad((coefficient.detach() * self.logp()).sum(), self.logits)
        return gradient


def states(rows: int = 4, length: int = 6, k: int = K, draws: int = 0) -> States:
    random = torch.Generator().manual_seed(5)
    logits, other, old = (
        torch.randn(rows, length, VOCABULARY, dtype=torch.float64, generator=random) for _ in range(3)
    )
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=random)
    ref_logp, old_logp = (t.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for t in (other, logits + 0.3 * old))
    mask = torch.rand(rows, length, generator=random) < 0.8
    reference = reference_top_k(other, k, labels=tokens, draws=draws, generator=random)
    return States(logits.requires_grad_(), tokens, ref_logp, old_logp, mask, reference)


SPECS = [
    "exact@loss/top:3",
    "exact@loss/top:3/is:token/floor:0.9",
    "exact@loss/top:3/is:prefix/cap:1.2",
    "exact@loss/top:3/is:sequence",
    "exact@loss/top:3/is:prefix/norm",
    "exact@loss/top:3/horizon:sequence/is:decision",
    "exact@loss/top:3/horizon:sequence/future:k3",
    "exact@loss/top:3/draws:5",
    "exact@loss/top:3/draws:2/is:token/floor:0.9",
    "exact@loss/top:3/draws:2/is:prefix/cap:1.2",
]


@pytest.mark.parametrize("text", SPECS)
def test_the_vectors_are_the_gradient_of_the_loss_by_the_logits(text: str) -> None:
    spec = KLSpec.parse(text)
    given = states(draws=spec.draws or 0)
    found = exact_kl(
        given.logits, None, given.tokens, reference=given.reference, ref_logp=given.ref_logp, mask=given.mask
    )
    assert 0 < (found.remainder != 0).sum() < given.mask.sum()
    term = kl_term(
        spec, given.logp(), given.ref_logp, given.mask, old_logp=given.old, exact=found.kl, remainder=found.remainder
    )
    (gradient,) = torch.autograd.grad(term.loss.sum(), given.logits)
    vector = given.in_cells(gradient)
    host = HostTerm(torch.where(given.mask, given.old, 9.0), None)
    states_ = {"exact": found.kl.detach(), "remainder": found.remainder, "cells": given.cells()}
    sides = given.logits.log_softmax(-1).gather(-1, given.tokens[..., None])[..., 0], given.ref_logp, given.mask
    one = measured(spec, *sides, old=given.old, sampler=None, probing=True, host=host, **states_)
    assert one.metrics["probe/square"] == pytest.approx(vector.square().sum().item())
    assert not any(value.requires_grad for value in one.metrics.values())
    u = (given.logp() - given.ref_logp).detach()
    for name, coefficient in (("k2", u), ("k1", torch.ones_like(u)), ("host", given.old)):
        other = given.in_cells(given.by_logits(coefficient.masked_fill(~given.mask, 0.0)))
        assert one.metrics[f"probe/{name}/dot"] == pytest.approx((vector * other).sum().item()), name
        assert one.metrics[f"probe/{name}/square"] == pytest.approx(other.square().sum().item()), name
        cosine = (vector * other).sum() / vector.norm() / other.norm()
        logged = probe_metrics({key: value.item() for key, value in one.metrics.items()})
        assert logged[f"kl/probe/{name}/cosine"] == pytest.approx(cosine.item())
        assert logged[f"kl/probe/{name}/norm_ratio"] == pytest.approx((other.norm() / vector.norm()).item())


def every_token() -> tuple[States, Tensor]:
    """One state per row, repeated once for each token that may be drawn in it, and the policy's probabilities."""
    given = states(length=1, k=VOCABULARY)
    logits = given.logits.detach()[:, 0]
    each = torch.arange(VOCABULARY)
    rows = len(logits)
    tokens = each.repeat(rows)[:, None]
    reference = RefTopK(*(part.repeat_interleave(VOCABULARY, 0) for part in given.reference[:3]))
    ref_logp = torch.zeros(rows, 1, VOCABULARY, dtype=torch.float64).scatter(
        -1, given.reference.ids, given.reference.logp
    )[:, 0]
    whole = States(
        logits.repeat_interleave(VOCABULARY, 0)[:, None].requires_grad_(), tokens, ref_logp.flatten()[:, None],
        tokens * 0.0, tokens >= 0, reference,
    )  # fmt: skip
    return whole, logits.softmax(-1).flatten()


def test_on_fresh_data_k2_has_the_exact_gradient_and_noise() -> None:
    given, p = every_token()
    logp, cells = given.logp().detach(), given.cells()
    spec = KLSpec.parse(f"exact@loss/top:{VOCABULARY}")
    totals: dict[str, float] = {}
    for token, weight in enumerate(p.tolist()):  # one micro-batch for each state and drawn token
        only = torch.zeros_like(given.mask)
        only[token] = True
        sums = probe_sums(0 * logp, logp, given.ref_logp, only, spec=spec, cells=cells)
        totals = {key: totals.get(key, 0.0) + weight * value.item() for key, value in sums.items()}
    u = (logp - given.ref_logp)[:, 0].view(-1, VOCABULARY)
    q = p.view(-1, VOCABULARY)
    exact = q * (u - (q * u).sum(-1, keepdim=True))
    assert totals["probe/square"] == pytest.approx(exact.square().sum().item())
    assert totals["probe/k2/dot"] == pytest.approx(totals["probe/square"])
    assert totals["probe/k3/dot"] != pytest.approx(totals["probe/square"], rel=0.05)  # it pulls towards another KL
    assert totals["probe/k1/dot"] == pytest.approx(0.0, abs=1e-12)
    found = probe_metrics(totals)
    assert found["kl/probe/k2/cosine"] * found["kl/probe/k2/norm_ratio"] == pytest.approx(1.0)
    assert found["kl/probe/k2/norm_ratio"] > 1.1  # the noise of one drawn token


def test_one_state_by_hand() -> None:
    # The policy gives 1/2, 1/4 and 1/4, the reference 1/4, 1/2 and 1/4. One token is kept, another one is drawn.
    policy, kept = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([1])
    reference = RefTopK(kept, torch.tensor([0.5]).double().log(), torch.tensor(0.5).double().log())
    found = cells_of(policy.log()[kept], torch.tensor(0), reference)
    u = math.log(0.5), math.log(1.5)  # of the kept token, and of the bucket, which has 3/4 instead of 1/2
    mean = 0.25 * u[0] + 0.75 * u[1]
    own, label = (0.25 * (u[0] - mean), 0.75 * (u[1] - mean)), (-0.25, 0.25)
    assert found.kl == pytest.approx(own[0] ** 2 + own[1] ** 2)
    assert found.both == pytest.approx(own[0] * label[0] + own[1] * label[1])
    assert found.label == pytest.approx(2 / 16)
    drawn = cells_of(policy.log()[kept], torch.tensor(1), reference)
    assert drawn.both == pytest.approx(-3 * found.both.item())
    assert drawn.label == pytest.approx(18 / 16)


def test_probabilities_of_zero_give_finite_numbers() -> None:
    nothing = torch.tensor([[0.0, -torch.inf, -torch.inf]]).double()
    reference = reference_top_k(nothing, 3)
    for log_probs in (nothing, torch.tensor([[-torch.inf, 0.0, -torch.inf]]).double()):
        found = cells_of(log_probs.gather(-1, reference.ids), torch.tensor([1]), reference)
        assert all(part.isfinite().all() for part in found)


def test_rounding_makes_no_bucket_where_every_token_is_kept() -> None:
    given = states(k=VOCABULARY)
    kept = given.logits.detach().log_softmax(-1).gather(-1, given.reference.ids)
    exact, rounded = (cells_of(kept - error, given.tokens, given.reference) for error in (0.0, 1e-6))
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_parts_join_into_the_whole() -> None:
    given, spec = states(), KLSpec.parse(SPECS[2])
    sides = [part.detach() for part in (given.logp(), given.ref_logp, given.mask, given.old)]
    kl = exact_kl(given.logits.detach(), None, given.tokens, reference=given.reference, ref_logp=given.ref_logp)

    def found(parts: list[list[int]]) -> dict[str, float]:
        accumulator = Accumulator()
        for rows in parts:
            logp, ref, mask, old = (part[rows] for part in sides)
            states_ = {"exact": kl.kl[rows], "remainder": kl.remainder[rows]}
            cells = Cells(*(part[rows] for part in given.cells()))
            one = measured(spec, logp, ref, mask, old=old, sampler=None, probing=True, cells=cells, **states_)
            accumulator.add(one.metrics, one.kept, 0.1)
        return accumulator.total()

    whole = found([[0, 1, 2, 3]])
    assert found([[0], [3, 1], [2]]) == pytest.approx(whole)
    assert 0 < whole["kl/probe/k2/cosine"] < 1


def test_without_the_numbers_of_the_reference_nothing_is_measured_and_the_keys_stay() -> None:
    given, spec = states(), KLSpec.parse(SPECS[0])
    sides = given.logp(), given.ref_logp, given.mask
    kl = exact_kl(given.logits.detach(), None, given.tokens, reference=given.reference, ref_logp=given.ref_logp)
    numbers = {"exact": kl.kl, "remainder": kl.remainder, "cells": given.cells()}
    with_, without = (
        measured(spec, *sides, old=None, sampler=None, probing=True, **states_) for states_ in (numbers, {})
    )
    assert with_.metrics.keys() == without.metrics.keys()
    assert not without.kept.any()
    assert without.metrics["kl/observed"] == 0
    assert all(value.isfinite() for value in without.metrics.values())
