"""``observe`` in every host: the measurement of a micro-batch, and what a host's settings say about the observation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.checkpoints import ALLOW_VARIABLE, SPEC, SpecChangedError, allowed
from kl_plugins.kernels.backend import say_once
from kl_plugins.observed import observed
from kl_plugins.probe import Cells, HostTerm, host_term, probe_sums
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation

HostKL = Callable[[Tensor], Tensor]
"""The host's own KL (B, T) of policy log-probs (B, T), in nats; called again in a probe."""


class Measured(NamedTuple):
    """The measurement of one micro-batch.

    Attributes:
        metrics: 0-d tensors by key, with the sums of a probe where there is one.
        kept: (B, T) bool, the response tokens that they are about.
    """

    metrics: dict[str, Tensor]
    kept: Tensor


def measured(
    spec: KLSpec,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    old: Tensor | None,
    sampler: Tensor | None,
    source: str = "unused",
    probing: bool = False,
    host: HostKL | HostTerm | None = None,
    in_loss: bool = True,
    truncated: bool = False,
    exact: Tensor | None = None,
    remainder: Tensor | None = None,
    cells: Cells | None = None,
) -> Measured:
    """Measure a spec on a micro-batch that trains under the host's own KL. Nothing that is passed in is changed.

    Args:
        spec: the observed spec.
        logp: (B, T) log-probs of the policy, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on response tokens.
        old, sampler: (B, T) log-probs of the trainer and of the sampler at rollout time, nats, or None.
        source: whose log-probs the weight divides by: ``sampler`` or ``old``; anything else: what the spec says.
        probing: whether to probe as well.
        host: the host's own KL function, or what it does to each token; None if it is not known.
        in_loss: whether the host differentiates its KL; otherwise its value is the penalty.
        truncated: the sampler's log-probs are those of a truncated distribution, so that they hold the kept mass.
        exact, remainder: (B, T) see :func:`kl_plugins.observed.observed`, nats, for a spec with ``top:``.
        cells: (B, T) each, for a probe of a spec with ``top:``.
    """
    logp, ref_logp = logp.detach(), ref_logp.detach()
    if spec.needs_behaviour and source in ("sampler", "old"):
        spec = replace(spec, behaviour=source)
    states = {"exact": exact, "remainder": remainder}
    found = observed(spec, logp, ref_logp, mask, old_logp=old, sampler_logp=sampler, **states)
    if not probing:
        return Measured(found.metrics, found.kept)
    named = spec.behaviour if spec.needs_behaviour else None
    divisor = {"old": old, "sampler": sampler}.get(named or "", old if sampler is None else sampler)
    if divisor is not None:
        divisor = torch.where(torch.isfinite(divisor), divisor.detach(), logp.to(divisor))
    sums = probe_sums(
        found.coefficient,
        logp,
        ref_logp,
        found.kept,
        behaviour_logp=divisor,
        host=host if host is None or isinstance(host, HostTerm) else host_term(host, logp, in_loss=in_loss),
        log_mass=(old - sampler).detach() if truncated and old is not None and sampler is not None else None,
        spec=spec if spec.top is not None else None,
        cells=cells,
    )
    return Measured({**found.metrics, **sums}, found.kept)


def require_unregularised(saved: Mapping[str, Any] | None, observation: Observation) -> None:
    """Refuse to resume a run under ``observe`` whose checkpoint was trained under a spec.

    A checkpoint of a run that was observed holds nothing of kl-plugins, because it was trained by the host alone.

    Args:
        saved: what the checkpoint holds of kl-plugins, or None.
        observation: of this run.

    Raises:
        SpecChangedError: the checkpoint was written under a spec, and this run trains under the host's own KL.
    """
    if saved is None or SPEC not in saved or allowed():
        return
    raise SpecChangedError(
        f"kl-plugins: the checkpoint was written under {saved[SPEC]}, and this run is configured with {observation}, "
        f"which observes and trains with the host's own KL. Resume with {saved[SPEC]}, start a new run, or set "
        f"{ALLOW_VARIABLE}=1 to change the regulariser in the middle of this one"
    )


def warn_unobserved(host: str, observation: Observation) -> None:
    """Log one line, once per process, where a host has trained without its KL being seen; the run goes on.

    Args:
        host: the host's name.
        observation: of the run.
    """
    say_once(
        f"kl-plugins: {observation}: {host} made an update in which its KL was not seen, so there are no kl/ metrics "
        "of it. Training is not affected. Either the host left its KL out (a coefficient of 0), or this trainer takes "
        "a path that kl-plugins does not know"
    )


def warn_not_of_these_tokens(host: str, observation: Observation) -> None:
    """Log one line, once per process, where what ``top:`` got of the reference cannot be used; the run goes on.

    Args:
        host: the host's name.
        observation: of the run.
    """
    say_once(
        f"kl-plugins: {observation}: what was recorded of the reference is missing in a micro-batch of {host}, or its "
        "log-probs are not those of the tokens there, so no token of it is measured (kl/observed is below 1). Training "
        "is not affected"
    )
