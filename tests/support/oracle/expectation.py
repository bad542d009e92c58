"""Expected gradients of what the package computes, by enumeration, for each place a penalty is put in."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins import KLSpec, KLTerm, RefTopK, exact_kl, kl_penalty, kl_term, reference_top_k
from kl_plugins.exact import TopKKL
from tests.support.oracle.enumeration import Problem


def padded(problem: Problem, values: Tensor) -> Tensor:
    """NaN where a sequence has ended: what stands outside the mask must not matter."""
    return values.masked_fill(~problem.mask, float("nan"))


def logits(problem: Problem, policy: str) -> Tensor:
    """(N, T, V) logits of every state passed through, NaN where a sequence has ended."""
    columns = [table[problem.states[:, t]] for t, table in enumerate(problem.policies[policy])]
    return torch.stack(columns, 1).masked_fill(~problem.mask[..., None], float("nan"))


def full_vocabulary_kl(problem: Problem, policy: str = "current") -> Tensor:
    """(N, T) KL to the reference of every state passed through, as the exact kernels return it to a host.

    Args:
        problem: policies and sequences.
        policy: whose KL; differentiable for `current`.
    """
    found = exact_kl(logits(problem, policy), logits(problem, "reference"), problem.tokens, mask=problem.mask)
    torch.testing.assert_close(found.logp, problem.log_probs(policy), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.ref_logp, problem.log_probs("reference"), rtol=1e-12, atol=1e-12)
    return padded(problem, found.kl)


def kept_of_the_reference(problem: Problem, chosen: int | tuple[int, ...]) -> RefTopK:
    """Its most probable tokens in each state, so many, or the same tokens in every state."""
    ref_logits = logits(problem, "reference")
    if isinstance(chosen, int):
        return reference_top_k(ref_logits, chosen)
    logp, ids = torch.log_softmax(ref_logits, -1), torch.tensor(chosen)
    rest = torch.full_like(logp, 0.0).index_fill(-1, ids, -torch.inf)
    return RefTopK(ids.expand(*logp.shape[:-1], -1), logp[..., ids], torch.logsumexp(logp + rest, -1))


def top_k_kl(problem: Problem, chosen: int | tuple[int, ...], policy: str = "current") -> TopKKL:
    """(N, T) each: KL of a set and a bucket in every state passed through, and the remainder of each token."""
    found = exact_kl(
        logits(problem, policy),
        None,
        problem.tokens,
        reference=kept_of_the_reference(problem, chosen),
        ref_logp=padded(problem, problem.log_probs("reference")),
        mask=problem.mask,
    )
    torch.testing.assert_close(found.logp, problem.log_probs(policy), rtol=1e-12, atol=1e-12)
    return found


def exact_for(spec: KLSpec, problem: Problem, policy: str, chosen: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """What a host passes beside the log-probs: nothing where the spec has no use for it.

    Args:
        spec: a parsed spec.
        problem: policies and sequences.
        policy: whose KL.
        chosen: the tokens of `top` in every state; by default the reference's most probable ones.
    """
    if not spec.needs_exact:
        return {}
    if spec.top is None:
        return {"exact": full_vocabulary_kl(problem, policy)}
    found = top_k_kl(problem, chosen or spec.top, policy)
    return {"exact": padded(problem, found.kl), "remainder": padded(problem, found.remainder)}


def term_for(
    spec: KLSpec,
    problem: Problem,
    data: str,
    *,
    given: tuple[str, ...] | None = None,
    exact: dict[str, Tensor] | None = None,
) -> KLTerm:
    """`kl_term` over all sequences.

    Args:
        spec: a loss spec.
        problem: policies and sequences.
        data: policy that the data come from; `current` means on-policy data.
        given: which of `old` and `sampler` are passed. By default the data's own policy; on-policy data pass the
            current log-probs as the sampler's.
        exact: what is passed for exact terms; by default that of `exact_for`.
    """
    names = given if given is not None else (data,)
    behaviour: dict[str, Tensor] = {}
    for name in names:
        keyword = "old_logp" if name == "old" else "sampler_logp"
        behaviour[keyword] = padded(problem, problem.log_probs(name).detach())
    return kl_term(
        spec,
        padded(problem, problem.log_probs("current")),
        padded(problem, problem.log_probs("reference")),
        problem.mask,
        **(exact_for(spec, problem, "current") if exact is None else exact),
        **behaviour,
    )


def loss_gradient(
    spec: KLSpec,
    problem: Problem,
    data: str,
    *,
    given: tuple[str, ...] | None = None,
    exact: dict[str, Tensor] | None = None,
) -> Tensor:
    """Expected gradient of the loss summed over tokens; arguments as in `term_for`."""
    loss = term_for(spec, problem, data, given=given, exact=exact).loss
    assert loss.dtype == torch.float64
    return problem.gradient(problem.expected(loss.sum(-1), data))


def penalty_for(spec: KLSpec, problem: Problem, evaluated: str = "current") -> Tensor:
    """(N, T) penalty computed from the log-probs of the policy `evaluated`."""
    penalty = kl_penalty(
        spec,
        padded(problem, problem.log_probs(evaluated).detach()),
        padded(problem, problem.log_probs("reference")),
        problem.mask,
        **exact_for(spec, problem, evaluated),
    )
    assert penalty.dtype == torch.float64
    assert not penalty.requires_grad
    return penalty


def reward_to_go(values: Tensor) -> Tensor:
    """Sum from each position to the end of the row."""
    return values.flip(-1).cumsum(-1).flip(-1)


def weights(problem: Problem, data: str, level: str) -> Tensor:
    """Detached (N, T) importance weights of the current policy over `data`; all 1 for level `none`."""
    log_ratio = (problem.log_probs("current") - problem.log_probs(data)).detach()
    if level == "none":
        return torch.ones_like(log_ratio)
    if level == "token":
        return log_ratio.exp()
    if level == "prefix":
        return log_ratio.cumsum(-1).exp()
    assert level == "sequence"
    return log_ratio.sum(-1, keepdim=True).exp().expand_as(log_ratio)


def score_gradient(problem: Problem, coefficient: Tensor, data: str, weight: str = "none") -> Tensor:
    """Expected sum_t w_t coefficient_t grad log pi(a_t | s_t) over sequences from `data`."""
    surrogate = weights(problem, data, weight) * coefficient.detach() * problem.log_probs("current")
    return problem.gradient(problem.expected((surrogate * problem.mask).sum(-1), data))


def policy_gradient(spec: KLSpec, problem: Problem, data: str = "current", weight: str = "none") -> Tensor:
    """Expected gradient that a host's policy-gradient loss gets from a score penalty, the host weighting it whole.

    A reward is summed to go by the host; an advantage penalty multiplies its own token's score.
    """
    penalty = penalty_for(spec, problem)
    coefficient = reward_to_go(penalty) if spec.placement == "reward" else penalty
    return score_gradient(problem, coefficient, data, weight)


def released_tail(problem: Problem, top: int) -> Tensor:
    """Expected gradient of a live head beside the tail r sg(u), as released with arXiv 2602.04417."""
    log_p = torch.log_softmax(logits(problem, "current").nan_to_num(0.0), -1)
    log_q = torch.log_softmax(logits(problem, "reference").nan_to_num(0.0), -1)
    head = torch.zeros_like(log_p).scatter(-1, log_p.topk(top, -1).indices, 1.0)
    u, index = log_p - log_q, problem.tokens[..., None]
    sampled, in_tail = log_p.gather(-1, index)[..., 0], 1 - head.gather(-1, index)[..., 0]
    ratio = (sampled - sampled.detach()).exp()
    kl = (head * log_p.exp() * u).sum(-1) + in_tail * ratio * u.gather(-1, index)[..., 0].detach()
    return problem.gradient(problem.expected((kl * problem.mask).sum(-1), "current"))
