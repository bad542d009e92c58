"""The contestants of the benchmark; each turns a problem into a scalar loss whose gradient reaches the policy.

Contestants of the kind ``exact`` compute the KL over the whole vocabulary. Those of the kind ``top-k`` choose the
reference's most probable tokens and compute the KL over these tokens and one bucket; the log-prob of the label under
the reference is given to them, because a host computes it in any case. Those of the kind ``sampled`` compute what a
host computes for a sampled k3, the log-probs of the labels under policy and reference. kl-plugins always returns these
log-probs in addition to the KL, so the naive contestants that start from logits do the same; the fastest of them also
takes part without log-probs. Peers run their own installed code. A peer that is not installed is left out, and its name
is reported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel.problems import Problem
from kl_plugins import exact_kl, linear_kl, linear_reference_top_k, reference_top_k

TOP_K = 64
"""Number of the reference's tokens in the contestants with top-k, without draws."""

Loss = Callable[[Problem], Tensor]


class Contestant(NamedTuple):
    """A contestant.

    Attributes:
        name: its name in tables.
        kind: ``exact``, ``top-k`` or ``sampled``.
        ours: whether it belongs to kl-plugins.
        loss: computes the scalar loss of a problem.
    """

    name: str
    kind: str
    ours: bool
    loss: Loss


class AbsentPeerError(RuntimeError):
    """A peer is not installed."""


def of_logits(device: str) -> Iterator[Contestant | AbsentPeerError]:
    """Yield the contestants that start from logits.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    yield Contestant("kl-plugins", "exact", True, _our_exact("auto"))
    if device == "cpu":  # on a GPU this reference implementation is hundreds of times slower than the kernels
        yield Contestant("kl-plugins, eager", "exact", True, _our_exact("eager"))
    yield Contestant(f"kl-plugins, top {TOP_K}", "top-k", True, _our_top_k(TOP_K))
    yield Contestant("naive", "exact", False, _naive_with_log_probs(_naive_statistics))
    # One is compiled for sizes that may change, as in training; the other as torch compiles by default.
    for name, dynamic in (("compile(naive)", True), ("compile(naive), static", None)):
        compiled = torch.compile(_naive_statistics, dynamic=dynamic)
        yield Contestant(name, "exact", False, _naive_with_log_probs(compiled))
    alone = torch.compile(_naive, dynamic=True)
    yield Contestant(
        "compile(naive), KL alone", "exact", False, lambda it: alone(it.policy, it.reference, it.token_weight)
    )
    yield _peer(_trl_logits)


def of_hidden_states(device: str) -> Iterator[Contestant | AbsentPeerError]:
    """Yield the contestants that start from hidden states and heads; they are the same on every device."""
    yield Contestant("kl-plugins, joint", "exact", True, _our_linear(joint=True))
    yield Contestant("kl-plugins, autograd", "exact", True, _our_linear(joint=False))
    yield Contestant(f"kl-plugins, top {TOP_K}", "top-k", True, _our_linear_top_k(TOP_K))
    yield Contestant("naive", "exact", False, _naive_linear(_naive))
    yield Contestant("compile(naive)", "exact", False, _naive_linear(torch.compile(_naive, dynamic=True)))
    for peer in (_trl_divergence, _liger_divergence, _trl_log_probs, _verl_log_probs):
        yield _peer(peer)


def _peer(make: Callable[[], Contestant]) -> Contestant | AbsentPeerError:
    try:
        return make()
    except (ImportError, PackageNotFoundError) as error:
        return AbsentPeerError(f"{make.__name__.strip('_')}: {error}")


def _our_exact(backend: str) -> Loss:
    def loss(it: Problem) -> Tensor:
        return (exact_kl(it.policy, it.reference, it.labels, backend=backend).kl * it.token_weight).sum()

    return loss


def _our_linear(*, joint: bool) -> Loss:
    def loss(it: Problem) -> Tensor:
        arguments = (it.policy, it.weight, it.reference, it.ref_weight, it.labels)
        if joint:
            return linear_kl(*arguments, kl_weight=it.token_weight).loss
        return (linear_kl(*arguments).kl * it.token_weight).sum()

    return loss


def _our_top_k(k: int) -> Loss:
    def loss(it: Problem) -> Tensor:
        kept = reference_top_k(it.reference, k)
        found = exact_kl(it.policy, None, it.labels, reference=kept, ref_logp=it.ref_logp)
        return (found.kl * it.token_weight).sum()

    return loss


def _our_linear_top_k(k: int) -> Loss:
    def loss(it: Problem) -> Tensor:
        assert it.weight is not None
        assert it.ref_weight is not None
        kept = linear_reference_top_k(it.reference, it.ref_weight, k)
        found = linear_kl(
            it.policy, it.weight, None, None, it.labels, reference=kept, ref_logp=it.ref_logp,
            differentiable_logp=False,  # a host has its own log-probs, with their gradient
        )  # fmt: skip
        return (found.kl * it.token_weight).sum()

    return loss


def _naive(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    logp, ref_logp = policy.float().log_softmax(-1), reference.float().log_softmax(-1)
    return ((logp.exp() * (logp - ref_logp)).sum(-1) * weight).sum()


def _naive_statistics(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp, ref_logp = policy.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    index = labels[:, None]
    return kl, logp.gather(-1, index)[:, 0], ref_logp.gather(-1, index)[:, 0]


def _naive_with_log_probs(statistics: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Loss:
    def loss(it: Problem) -> Tensor:
        return (statistics(it.policy, it.reference, it.labels)[0] * it.token_weight).sum()

    return loss


def _naive_linear(of_logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def loss(it: Problem) -> Tensor:
        assert it.weight is not None
        assert it.ref_weight is not None
        return of_logits(it.policy @ it.weight.T, it.reference @ it.ref_weight.T, it.token_weight)

    return loss


def _k3(logp: Tensor, ref_logp: Tensor, weight: Tensor) -> Tensor:
    delta = ref_logp - logp
    return ((delta.exp() - delta - 1) * weight).sum()


def _trl_logits() -> Contestant:
    from trl.trainer.utils import selective_log_softmax

    def loss(it: Problem) -> Tensor:
        with torch.no_grad():
            ref_logp = selective_log_softmax(it.reference, it.labels)
        return _k3(selective_log_softmax(it.policy, it.labels), ref_logp, it.token_weight)

    return Contestant(f"TRL {_version('trl')}, sampled k3", "sampled", False, loss)


def _trl_divergence() -> Contestant:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(it: Problem) -> Tensor:
        reverse_kl = 1.0
        divergence = ChunkedDivergenceFunction.apply(
            it.policy, it.weight, None, it.reference, it.ref_weight, None, reverse_kl
        )[0]
        return (divergence * it.token_weight).sum()

    return Contestant(f"TRL {_version('trl')}, ChunkedDivergence", "exact", False, loss)


def _liger_divergence() -> Contestant:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def loss(it: Problem) -> Tensor:
        # Without the hard loss and with beta 1, this is the reverse KL as one scalar. It has no weights of tokens.
        found: Any = LigerFusedLinearJSDFunction.apply(
            it.policy, it.weight, it.reference, it.ref_weight, it.labels, None, None, 0.0, 1.0, 1.0, -100, 1.0, True
        )
        return found[0] if isinstance(found, tuple) else found

    return Contestant(f"Liger {_version('liger-kernel')}, JSD beta=1", "exact", False, loss)


def _trl_log_probs() -> Contestant:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def score(hidden: Tensor, weight: Tensor | None, labels: Tensor, outputs: tuple[str, ...]) -> Tensor:
        logp: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0]
        return logp

    def loss(it: Problem) -> Tensor:
        with torch.no_grad():
            ref_logp = score(it.reference, it.ref_weight, it.labels, ("log_probs",))
        return _k3(score(it.policy, it.weight, it.labels, ("log_probs",)), ref_logp, it.token_weight)

    return Contestant(f"TRL {_version('trl')}, sampled k3", "sampled", False, loss)


def _verl_log_probs() -> Contestant:
    fused = _module_of("verl", "verl/utils/experimental/torch_functional.py").FusedLinearForPPO()

    def loss(it: Problem) -> Tensor:
        with torch.no_grad():
            ref_logp = fused(it.reference, it.ref_weight, it.labels)[0]
        return _k3(fused(it.policy, it.weight, it.labels)[0], ref_logp, it.token_weight)

    return Contestant(f"veRL {_version('verl')}, sampled k3 with entropy", "sampled", False, loss)


def _module_of(name: str, path: str) -> Any:
    """Import one file of an installed distribution, without importing its package."""
    file = next((f for f in distribution(name).files or () if str(f) == path), None)
    if file is None:
        raise ImportError(f"{name} has no {path}")
    module_name = f"benchmarked_{name}"
    spec = importlib.util.spec_from_file_location(module_name, str(file.locate()))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _version(name: str) -> str:
    return distribution(name).version
