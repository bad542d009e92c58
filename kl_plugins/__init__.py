"""KL regularisers with the right gradient for RLHF frameworks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "KLSpec": "kl_plugins.spec",
    "KLSpecError": "kl_plugins.spec",
    "KLTerm": "kl_plugins.term",
    "kl_term": "kl_plugins.term",
    "kl_penalty": "kl_plugins.penalty",
    "exact_kl": "kl_plugins.exact",
    "linear_kl": "kl_plugins.exact",
    "sharded_exact_kl": "kl_plugins.tensor_parallel",
    "RefTopK": "kl_plugins.reference",
    "reference_top_k": "kl_plugins.reference",
    "linear_reference_top_k": "kl_plugins.reference",
    "register_estimator": "kl_plugins.estimators",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from kl_plugins.estimators import register_estimator as register_estimator
    from kl_plugins.exact import exact_kl as exact_kl
    from kl_plugins.exact import linear_kl as linear_kl
    from kl_plugins.penalty import kl_penalty as kl_penalty
    from kl_plugins.reference import RefTopK as RefTopK
    from kl_plugins.reference import linear_reference_top_k as linear_reference_top_k
    from kl_plugins.reference import reference_top_k as reference_top_k
    from kl_plugins.spec import KLSpec as KLSpec
    from kl_plugins.spec import KLSpecError as KLSpecError
    from kl_plugins.tensor_parallel import sharded_exact_kl as sharded_exact_kl
    from kl_plugins.term import KLTerm as KLTerm
    from kl_plugins.term import kl_term as kl_term


def __getattr__(name: str) -> Any:
    # Each name is imported on first use, so that the command line and spec errors do not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
