"""The top k tokens exactly, the tail by the sampled one: unbiased, on- and off-policy, in every place it may stand."""

from __future__ import annotations

import pytest
import torch

from kl_plugins import exact_kl
from tests.support.oracle.expectation import full_vocabulary_kl, loss_gradient, policy_gradient, released_tail
from tests.support.oracle.problems import MARGIN, TOLERANCE, problems
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import all_targets, relative_error, target_gradient

TOPS = (1, 2)


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("text", ["exact@loss", "exact@loss/horizon:sequence", "exact@loss/horizon:sequence/future:k1"])
def test_on_policy(text: str, top: int) -> None:
    spec = parse(f"{text}/top:{top}")
    for problem in problems():
        wanted = target_gradient(problem, spec.target, "", "current")
        assert relative_error(loss_gradient(spec, problem, "current", given=()), wanted) < TOLERANCE


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize(
    "text",
    [
        "exact@loss/is:prefix",
        "exact@loss/is:sequence",
        "exact@loss/horizon:sequence/is:decision",
        "exact@loss/horizon:sequence/is:sequence",
        "exact@loss/horizon:sequence/future:k1/is:decision",
    ],
)
def test_off_policy(text: str, top: int) -> None:
    spec = parse(f"{text}/top:{top}")
    for problem in problems():
        for data in ("old", "sampler"):
            wanted = target_gradient(problem, spec.target, "", data)
            assert relative_error(loss_gradient(spec, problem, data), wanted) < TOLERANCE


@pytest.mark.parametrize("top", TOPS)
def test_as_an_advantage(top: int) -> None:
    spec = parse(f"exact@advantage/top:{top}")
    for problem in problems():
        wanted = target_gradient(problem, spec.target, "", "current")
        assert relative_error(policy_gradient(spec, problem), wanted) < TOLERANCE


def test_stale_data_need_the_weight() -> None:
    """Unlike the whole vocabulary, a sampled tail is not exact on the behaviour policy's states."""
    spec = parse("exact@loss/top:1")
    for problem in problems():
        for data in ("old", "sampler"):
            gradient = loss_gradient(spec, problem, data)
            assert min(relative_error(gradient, wanted) for wanted in all_targets(problem, data).values()) > MARGIN


def test_the_value_is_unbiased_and_all_tokens_are_exact() -> None:
    for problem in problems():
        whole = full_vocabulary_kl(problem)[problem.mask]
        every = full_vocabulary_kl(problem, top=problem.vocab + 5)[problem.mask]
        torch.testing.assert_close(every, whole, rtol=1e-10, atol=1e-12)
        weights = torch.linspace(0.5, 1.5, len(whole), dtype=torch.float64)
        gradients = [problem.gradient((weights * kl).sum()) for kl in (every, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        part = full_vocabulary_kl(problem, top=1).nan_to_num(0.0).sum(-1)
        total = full_vocabulary_kl(problem).nan_to_num(0.0).sum(-1)
        torch.testing.assert_close(problem.expected(part, "current"), problem.expected(total, "current"))


def test_the_published_tail_is_biased() -> None:
    for problem in problems():
        wanted = target_gradient(problem, "reverse_kl_token", "", "current")
        assert relative_error(released_tail(problem, 1), wanted) > MARGIN


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 3.0, "ref_softcap": 2.0}], ids=str)
def test_gradient_of_the_surrogate(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    live, ref = torch.randn(6, 5, dtype=torch.float64).requires_grad_(), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, -100])
    drawn = torch.randn(6, dtype=torch.float64) - 1
    grads = torch.rand(2, 6, dtype=torch.float64)
    found = exact_kl(live, ref, labels, top=2, behaviour_logp=drawn, **options)
    torch.autograd.backward(found[:2], list(grads))
    one, other = live.detach().requires_grad_(), ref
    temperature = options.get("temperature", 1.0)
    if "softcap" in options:
        z, other = 3 * torch.tanh(one / 3), 2 * torch.tanh(ref / 2)
    else:
        z = one
    log_p, log_q = torch.log_softmax(z / temperature, -1), torch.log_softmax(other / temperature, -1)
    u = (log_p - log_q).detach()
    head = torch.zeros_like(u).scatter(-1, log_p.topk(2, -1).indices, 1.0)
    index = labels.clamp_min(0)[:, None]
    sampled = log_p.gather(-1, index)[:, 0]
    tail = (1 - head.gather(-1, index)[:, 0]) * (sampled.detach() - drawn).exp() * u.gather(-1, index)[:, 0]
    kl = (head * log_p.exp() * u).sum(-1) + tail * (sampled - sampled.detach()).exp()
    kept = labels >= 0
    torch.testing.assert_close(found.kl, kl * kept)
    ((grads[0] * kl + grads[1] * sampled) * kept).sum().backward()
    torch.testing.assert_close(live.grad, one.grad)


def test_mistakes() -> None:
    rows = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="top=0"):
        exact_kl(*rows, top=0)
    with pytest.raises(ValueError, match="without top nothing is sampled"):
        exact_kl(*rows, behaviour_logp=torch.zeros(2))
    with pytest.raises(ValueError, match="one per position"):
        exact_kl(*rows, top=1, behaviour_logp=torch.zeros(3))
