"""``top:`` in veRL in its two forms: with veRL's own log-probs where they are float32, else from the logits alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from verl.utils import torch_functional

from kl_plugins import KLSpec
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.verl.batch import MASK, REFERENCE
from kl_plugins.adapters.verl.exact import CELLS, EXACT, REMAINDER, packed_top_k
from kl_plugins.adapters.verl.top_k import LOG_PROBS, LOGITS, Recorder
from kl_plugins.patches.verl.worker import CROSS_ENTROPY, log_probs_in_32_bits
from kl_plugins.spec.grammar import numbers_per_token

K, VOCABULARY = 4, 40
LENGTHS, RESPONSES = (7, 5, 9), (3, 2, 6)
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = sum(LENGTHS)


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def next_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(N,) float32, as flash attention's cross entropy gives them for logits of any dtype."""
    return logits[0].float().log_softmax(-1).gather(-1, tokens.roll(-1)[:, None])[:, 0]


def by_response(packed: Tensor) -> Tensor:
    rows = torch.zeros(len(LENGTHS), max(RESPONSES))
    for row, (part, count) in enumerate(zip(packed.split(LENGTHS), RESPONSES, strict=True)):
        rows[row, :count] = part[-count - 1 : -1]
    return rows


@pytest.fixture(params=["", "/draws:3"], ids=["no draws", "draws"])
def spec(request: pytest.FixtureRequest) -> KLSpec:
    return KLSpec.parse(f"exact@loss/top:{K}{request.param}")


@pytest.fixture(params=DTYPES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits (1, N, V) of policy and reference, and a micro-batch."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(1, TOKENS, VOCABULARY)).to(request.param)
    ref_logits = (logits.float() + 0.3 * torch.randn(logits.shape)).to(request.param)
    tokens = torch.randint(0, VOCABULARY, (TOKENS,))
    data = {
        "input_ids": nested(list(tokens.split(LENGTHS))),
        "responses": nested([torch.zeros(n, dtype=torch.long) for n in RESPONSES]),
        REFERENCE: by_response(next_log_probs(ref_logits, tokens)),
        MASK: nested([torch.ones(n) for n in RESPONSES]),
    }
    return logits, ref_logits, data


def recorded(ref_logits: Tensor, data: dict[str, Any], with_log_probs: bool, spec: KLSpec) -> Tensor:
    recorder = Recorder(K, lambda logits: with_log_probs, spec.draws)
    assert recorder(data=data, **{LOGITS: ref_logits}) == {}
    tokens = data["input_ids"].values()
    output = {LOG_PROBS: nested(list(next_log_probs(ref_logits, tokens).split(LENGTHS)))}
    recorder(model_output=output, data=data)
    return output[KEY]


def test_the_references_numbers_are_the_same_in_both_forms(
    case: tuple[Tensor, Tensor, dict[str, Any]], spec: KLSpec
) -> None:
    _, ref_logits, data = case
    ours, theirs = (recorded(ref_logits, data, form, spec) for form in (True, False))
    assert [len(part) for part in ours.unbind()] == [n * numbers_per_token(K, spec.draws) for n in RESPONSES]
    # The forms draw different tokens, but each token has the same chance: see the label's, which stands last.
    same = [*range(2 * K + 1), *([-1] if spec.draws else [])]
    given = (form.values().view(-1, numbers_per_token(K, spec.draws))[:, same] for form in (ours, theirs))
    torch.testing.assert_close(*given, rtol=1e-5, atol=1e-5)


def test_the_policys_term_and_gradient_are_the_same_in_both_forms(
    case: tuple[Tensor, Tensor, dict[str, Any]], spec: KLSpec
) -> None:
    logits, ref_logits, data = case
    data[KEY] = recorded(ref_logits, data, True, spec)
    tokens, upstream = data["input_ids"].values(), torch.rand(len(RESPONSES), max(RESPONSES))
    results = []
    for precise in (True, False):
        leaf = logits.clone().requires_grad_()
        found, pending, difference = packed_top_k(spec, leaf, data, False, precise, probed=True)
        assert difference == 0
        assert (pending is None) != precise
        if pending is None:
            exact, remainder, *cells = (by_response(found[key][0]) for key in (EXACT, REMAINDER, *CELLS))
        else:
            own = by_response(next_log_probs(leaf, tokens))
            exact, remainder = pending.with_log_probs(spec, own)
            cells = pending.cells(own)
        (exact * upstream).sum().backward()
        assert not any(part.requires_grad for part in cells)
        results.append((exact.detach(), remainder, leaf.grad.float(), *cells))
    # The remainder contains the log of the bucket, whose error of about 1e-6 is relative to a small probability.
    limits = 1e-5, 1e-4, 1e-5 if logits.dtype == torch.float32 else 1e-2, *[1e-5] * 3
    for (ours, theirs), bound in zip(zip(*results, strict=True), limits, strict=True):
        assert ours.abs().max() > 0
        assert (ours - theirs).abs().max() < bound


def test_which_log_probs_are_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(torch_functional, CROSS_ENTROPY, False)
    assert log_probs_in_32_bits(torch.zeros(1))
    assert not log_probs_in_32_bits(halves)
    monkeypatch.setattr(torch_functional, CROSS_ENTROPY, True)
    assert log_probs_in_32_bits(halves)
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert not log_probs_in_32_bits(halves)
