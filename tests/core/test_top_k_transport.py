"""The reference's top-k numbers, packed into one tensor for the way through a host, and unpacked again."""

import pytest
import torch

from kl_plugins import exact_kl
from kl_plugins.adapters.log_probs import disagreement
from kl_plugins.adapters.top_k import LARGEST_ID, generator_of, label_log_probs, packed, unpacked
from kl_plugins.reference import RefTopK, reference_top_k
from kl_plugins.spec.grammar import numbers_per_token


def test_unpacking_gives_back_what_was_packed() -> None:
    kept = reference_top_k(torch.randn(2, 3, 50), 4, temperature=0.7)
    numbers = packed(kept)
    assert numbers.shape == (2, 3, 9)
    assert numbers.dtype == torch.float32
    found = unpacked(numbers, 0.7)
    for before, after in zip(kept[:3], found[:3], strict=True):
        assert torch.equal(before, after)
    assert found.temperature == 0.7


def test_unpacking_gives_back_the_draws() -> None:
    logits, labels = torch.randn(2, 3, 50), torch.randint(50, (2, 3))
    kept = reference_top_k(logits, 4, labels=labels, draws=5)
    numbers = packed(kept)
    assert numbers.shape == (2, 3, numbers_per_token(4, 5)) == (2, 3, 25)
    found = unpacked(numbers, draws=5)
    assert found.draws is not None
    assert kept.draws is not None
    for before, after in zip((*kept[:3], *kept.draws), (*found[:3], *found.draws), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(found.tokens, torch.cat([kept.ids, kept.draws.ids], -1))
    for wrong in (4, 6, 8):
        with pytest.raises(ValueError, match="changed them on their way"):
            unpacked(numbers, draws=wrong)
    assert numbers_per_token(4) == 9


def test_draws_depend_on_the_labels_alone() -> None:
    labels = torch.randint(1000, (40,))
    states = [generator_of(part).initial_seed() for part in (labels, labels.clone(), labels[:-1], labels.roll(1))]
    assert states[0] == states[1]
    assert len(set(states)) == 3
    assert generator_of(labels[:0]).initial_seed() == 0


def test_a_vocabulary_without_other_tokens_keeps_its_empty_tail() -> None:
    found = unpacked(packed(reference_top_k(torch.randn(5, 6), 6)))
    assert torch.equal(found.log_tail, torch.full((5,), -torch.inf))


@pytest.mark.parametrize("token", [LARGEST_ID - 1, LARGEST_ID])
def test_a_token_id_that_float32_would_round_is_refused(token: int) -> None:
    kept = RefTopK(torch.tensor([[token]]), torch.tensor([[-0.1]]), torch.tensor([-2.4]))
    if token < LARGEST_ID:
        assert unpacked(packed(kept)).ids.item() == token
    else:
        with pytest.raises(ValueError, match="token ids below"):
            packed(kept)


def test_a_host_that_changed_the_numbers_is_noticed() -> None:
    numbers = packed(reference_top_k(torch.randn(3, 50), 4))
    with pytest.raises(ValueError, match="changed them on their way"):
        unpacked(numbers.bfloat16())
    with pytest.raises(ValueError, match="changed them on their way"):
        unpacked(numbers[:, :-1])


def test_masked_positions_may_hold_the_zeros_of_a_hosts_padding() -> None:
    logits, labels = torch.randn(1, 4, 50), torch.randint(50, (1, 4))
    numbers = packed(reference_top_k(torch.randn(1, 4, 50), 4))
    numbers[:, 2:] = 0.0
    mask = torch.tensor([[True, True, False, False]])
    logits.requires_grad_()
    found = exact_kl(logits, None, labels, reference=unpacked(numbers), ref_logp=torch.zeros(1, 4), mask=mask)
    found.kl.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not found.kl[:, 2:].any()
    assert not logits.grad[:, 2:].any()


def test_numbers_of_other_positions_do_not_agree_with_the_hosts_log_probs() -> None:
    logits = 3.0 * torch.randn(2, 30, 50)
    labels = torch.distributions.Categorical(logits=logits).sample()
    ref_logp = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    kept, mask = reference_top_k(logits, 8), torch.ones(2, 30, dtype=torch.bool)
    assert disagreement(label_log_probs(kept, labels, ref_logp), ref_logp, mask, rounded=False) is None
    moved = RefTopK(*(part.roll(1, 1) for part in kept[:3]))
    assert disagreement(label_log_probs(moved, labels, ref_logp), ref_logp, mask, rounded=True) is not None


def test_a_label_that_was_not_kept_cannot_be_more_probable_than_the_kept_tokens() -> None:
    # Numbers of other positions often lack the label, which is one of the most probable tokens of its own position.
    kept = RefTopK(torch.tensor([[3, 5]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([-0.7]))
    for ref_logp, expected in ((-0.5, -2.0), (-4.0, -4.0)):
        found = label_log_probs(kept, torch.tensor([7]), torch.tensor([ref_logp]))
        assert found.item() == expected
