"""The contestants of the kernel benchmark that use the top-k tokens, and the problem that all contestants get."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.kernel import contestants
from benchmarks.kernel.problems import Problem, Size, problem

SIZES = (Size(12, 500), Size(12, 500, 16))


def loss_and_gradient(loss: contestants.Loss, given: Problem) -> tuple[float, torch.Tensor]:
    given.clear()
    value = loss(given)
    value.backward()
    assert given.policy.grad is not None
    return value.item(), given.policy.grad.clone()


def exact_of(size: Size) -> contestants.Loss:
    return contestants._our_linear(joint=False) if size.width else contestants._our_exact("eager")


def top_k_of(size: Size, k: int) -> contestants.Loss:
    return contestants._our_linear_top_k(k) if size.width else contestants._our_top_k(k)


@pytest.mark.parametrize("size", SIZES, ids=["logits", "hidden"])
def test_all_tokens_kept_is_the_exact_kl(size: Size) -> None:
    given = problem(size, torch.float32, "cpu")
    exact, gradient = loss_and_gradient(exact_of(size), given)
    whole, gradient_of_whole = loss_and_gradient(top_k_of(size, size.vocab), given)
    assert whole == pytest.approx(exact, rel=1e-3)
    assert (gradient_of_whole - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("size", SIZES, ids=["logits", "hidden"])
def test_few_tokens_kept_are_a_part_of_it(size: Size) -> None:
    given = problem(size, torch.float32, "cpu")
    exact, _ = loss_and_gradient(exact_of(size), given)
    part, gradient = loss_and_gradient(top_k_of(size, 8), given)
    assert 0 < part < 0.9 * exact
    assert gradient.norm() > 0


@pytest.mark.parametrize("size", SIZES, ids=["logits", "hidden"])
def test_log_probs_of_the_labels_are_those_of_the_reference(size: Size) -> None:
    given = problem(size, torch.bfloat16, "cpu")
    logits = given.reference.float()
    if given.ref_weight is not None:
        logits = logits @ given.ref_weight.float().T
    expected = logits.log_softmax(-1)[torch.arange(size.tokens), given.labels]
    torch.testing.assert_close(given.ref_logp, expected)


@pytest.mark.parametrize("made", [contestants.of_logits, contestants.of_hidden_states])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_top_k_takes_part_on_every_device(made: Callable[[str], Iterator[object]], device: str) -> None:
    names = (it.name for it in made(device) if isinstance(it, contestants.Contestant))
    assert "kl-plugins, top 64" in names
