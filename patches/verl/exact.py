"""How exact terms get logits out of veRL's engine: through the seam by which it shows them to a distillation loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.verl.exact import KEY, LOGITS, packed_kl
from kl_plugins.adapters.verl.session import Session
from kl_plugins.spec import KLSpec

SHOW, ONLY, ENTROPY = "distillation_use_topk", "distillation_only", "calculate_entropy"
"""veRL's switches: show the logits to the loss function; compute no log-probs; compute the entropy."""


@contextmanager
def showing_logits(session: Session, data: Any) -> Iterator[None]:
    """Within the block, the engine shows the logits of each micro-batch, and the reference model is ready.

    Args:
        session: the worker's; does nothing unless its spec has exact terms.
        data: the mini-batch that the engine is going to train on.
    """
    if not session.spec.needs_exact:
        yield
        return
    from verl.utils import tensordict_utils

    tensordict_utils.assign_non_tensor(data, **{SHOW: True})
    with session.reference.engine.eval_mode():
        yield


def on_logits(session: Session | None, *, config: Any, data: Any, **shown: Tensor) -> dict[str, Tensor]:
    """The loss function, called with the engine's logits: gives the KL of each packed position.

    Raises:
        RuntimeError: the engine shows logits that no exact spec asked for.
    """
    if session is None or not session.spec.needs_exact:
        raise RuntimeError("kl-plugins: veRL's engine showed its logits to a PPO loss that did not ask for them")
    overwritten = _backward_overwrites(data)
    found = packed_kl(
        session.spec, shown[LOGITS], lambda: _reference_logits(session, data), data, session.behaviour, overwritten
    )
    return {KEY: found}


def of_model_output(spec: KLSpec, model_output: Any, data: Any) -> Tensor:
    """(B, T) KL of the states, from what :func:`on_logits` gave the engine.

    Raises:
        RuntimeError: the engine never showed its logits.
    """
    from verl.workers.utils.padding import no_padding_2_padding

    if KEY not in model_output:
        raise RuntimeError(
            f"kl-plugins: veRL's engine never showed its logits, so {spec} could not be computed; this engine or its "
            "settings (fused kernels) are not ones that exact terms know"
        )
    padded: Tensor = no_padding_2_padding(model_output[KEY], data)
    return padded


def _reference_logits(session: Session, data: Any) -> Tensor:
    from verl.utils import tensordict_utils

    caught: list[Tensor] = []

    def catch(model_output: Any = None, data: Any = None, dp_group: Any = None, **shown: Tensor) -> Any:
        if LOGITS in shown:
            caught.append(shown[LOGITS])
            return {}
        return torch.zeros(()), {}

    batch = data.copy()
    tensordict_utils.assign_non_tensor(batch, **{SHOW: True, ONLY: True, ENTROPY: False})
    with torch.no_grad():
        session.reference.engine.forward_step(batch, loss_function=catch, forward_only=True)
    return caught[0]


def _backward_overwrites(data: Any) -> bool:
    """Whether veRL's log-probs are differentiated in place: by flash-attention's cross entropy, without an entropy."""
    from verl.utils import tensordict_utils, torch_functional

    if tensordict_utils.get_non_tensor_data(data=data, key=ENTROPY, default=False):
        return False
    return bool(getattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True))
