"""Log-probs that the host computes: recorded as it computes them, and told apart by what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from kl_plugins.adapters.log_probs import finite_or
from kl_plugins.spec import KLSpec

OLD, REFERENCE, SAMPLER = "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"
"""GRPO's own keys of a micro-batch; RLOO keeps none of them, so the first two are added there."""


class Scored(NamedTuple):
    """One call of the host's log-prob function: its result (B, T) in nats, and its arguments."""

    logp: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def response_mask(self) -> Tensor:
        """(B, T) bool: the response part of the attention mask that the host scored with."""
        named = (
            dict(zip(("model", "input_ids", "attention_mask", "logits_to_keep"), self.args, strict=False)) | self.kwargs
        )
        mask: Tensor = named["attention_mask"]
        return mask[:, -named["logits_to_keep"] :].bool()


@dataclass
class Recorder:
    """Keeps the host's log-prob calls while it is on."""

    _calls: list[Scored] | None = None
    _then: Callable[[Scored], None] | None = field(default=None, repr=False)

    @contextmanager
    def recording(self, then: Callable[[Scored], None] | None = None) -> Iterator[list[Scored]]:
        """Within the block, every call is appended to the list, and handed to ``then``."""
        before = self._calls, self._then
        calls: list[Scored] = []
        self._calls, self._then = calls, then
        try:
            yield calls
        finally:
            self._calls, self._then = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block, nothing is recorded."""
        before = self._calls, self._then
        self._calls = self._then = None
        try:
            yield
        finally:
            self._calls, self._then = before

    @property
    def calls(self) -> list[Scored]:
        """The calls of the current block."""
        return [] if self._calls is None else self._calls

    def record(self, scored: Scored) -> None:
        """Called by the hook around the host's log-prob function."""
        if self._calls is not None:
            self._calls.append(scored)
            if self._then is not None:
                self._then(scored)


def policy_and_reference(
    calls: list[Scored], score_policy: Callable[[Scored], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The rollout's log-probs under policy and reference, from the host's calls while it generated.

    TRL scores the policy first, unless the data are on-policy, and the reference last. The model object does not tell
    them apart: under PEFT it is the same one with its adapter off.

    Args:
        calls: what the host computed, in order.
        score_policy: scores the same tokens under the policy, where the host did not.

    Returns:
        Policy and reference log-probs, nats, and the response mask; all (B, T).

    Raises:
        RuntimeError: the host made another number of calls.
    """
    if len(calls) not in (1, 2):
        raise RuntimeError(
            f"kl-plugins: TRL scored the rollout {len(calls)} times where one (reference) or two (policy, reference) "
            "were expected; this trainer is not one that kl-plugins knows"
        )
    reference = calls[-1]
    policy = calls[0].logp if len(calls) == 2 else score_policy(reference)
    return policy, reference.logp, reference.response_mask()


def behaviour_source(spec: KLSpec, config: Any, sampler_expected: bool) -> str:
    """Which log-probs the importance weight divides by: ``sampler``, ``old``, ``current`` or ``unused``.

    ``current``: TRL drops the old log-probs where each rollout serves one optimizer step, because they equal the
    policy's own.
    """
    if not spec.needs_behaviour:
        return "unused"
    if spec.behaviour == "sampler" or (spec.behaviour is None and sampler_expected):
        return "sampler"
    kept = config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) != 0
    corrected = getattr(config, "use_vllm", False) and getattr(config, "vllm_importance_sampling_correction", False)
    return "old" if kept or corrected else "current"


def behaviour_log_probs(source: str, inputs: Mapping[str, Any], logp: Tensor) -> dict[str, Tensor]:
    """``old_logp`` and ``sampler_logp`` for ``kl_term``.

    What the weight divides by is handed on as it is; what only metrics use is made finite.

    Args:
        source: what :func:`behaviour_source` said.
        inputs: the host's micro-batch.
        logp: (B, T) the policy's own log-probs, nats.

    Raises:
        ValueError: the sampler's log-probs are missing.
    """
    logp = logp.detach()
    old, sampler = inputs.get(OLD), inputs.get(SAMPLER)
    if source == "sampler":
        if sampler is None:
            raise ValueError(
                "kl-plugins: the sampler's log-probs were expected, but TRL handed none over; return 'logprobs' from "
                "rollout_func, or say behaviour:old in the spec"
            )
        return {"sampler_logp": sampler}
    if source != "unused":
        return {"old_logp": logp if old is None else old}
    given = finite_or(old, logp)
    given = logp if given is None else given
    mismatch = finite_or(sampler, given)
    return {"old_logp": given} if mismatch is None else {"old_logp": given, "sampler_logp": mismatch}
