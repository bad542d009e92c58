"""OpenRLHF: its real Ray actors on the CPU, in 16 bits or in float32, and the flags of its KL.

OpenRLHF computes in 16 bits only. To compare it with hosts that compute in float32, :func:`know_float32` adds one entry
to the table of dtypes in its actors, and :func:`parsed_in` sets that dtype in its parsed command line. All other code
is OpenRLHF's own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.drivers import openrlhf_actor
from tests.support.openrlhf import harness
from tests.support.openrlhf.ray_support import CPU_HOST, ENVIRONMENT, local_cluster


@cache
def prepare() -> None:
    """Prepare this process for OpenRLHF. Call it before OpenRLHF is imported."""
    os.environ.update(ENVIRONMENT)
    sys.path.append(str(CPU_HOST))
    importlib.import_module("openrlhf_on_cpu").install()


@contextmanager
def session(*modules: ModuleType) -> Iterator[None]:
    """Start a Ray job with kl-plugins attached. It ends at the end of the ``with`` block.

    Args:
        modules: modules whose functions are sent to the actors by value.
    """
    prepare()
    import ray

    with local_cluster(attached=True):
        for module in modules:
            ray.cloudpickle.register_pickle_by_value(module)
        yield


def know_float32(host: harness.Harness) -> harness.Harness:
    """Add float32 to the dtypes of policy and reference actors, and return the same actors."""
    import ray

    ray.cloudpickle.register_pickle_by_value(openrlhf_actor)
    for actor in host.policy._actor_handlers + host.reference._actor_handlers:
        ray.get(actor.__ray_call__.remote(openrlhf_actor.allow_float32))
    return host


def actors_of(assets: Path, ranks: int = 1) -> harness.Harness:
    """Start new actors that can compute in float32. Ray must be initialised."""
    return know_float32(harness.Harness(assets, ranks))


@contextmanager
def parsed_in(dtype: str) -> Iterator[None]:
    """Within the ``with`` block, let everything that the harness starts compute in this dtype, such as `fp32`."""
    parse = harness.parse

    def parsed(*args: Any, **kwargs: Any) -> Any:
        found = parse(*args, **kwargs)
        found.ds.param_dtype = dtype
        return found

    with mock.patch.object(harness, "parse", parsed):
        yield


def kl_flags(kl: str, *, in_loss: bool, unbiased_gradient: bool = False) -> list[str]:
    """Return the flags of a KL on OpenRLHF's command line, without its coefficient.

    Args:
        kl: the spec, or OpenRLHF's name of an estimator.
        in_loss: whether the KL is a term of the loss.
        unbiased_gradient: value of OpenRLHF's flag with this name, for its own estimators.
    """
    found = ["--algo.kl.estimator", kl]
    if in_loss:
        found.append("--algo.kl.use_loss")
    return found + ["--algo.kl.unbiased_gradient"] * unbiased_gradient
