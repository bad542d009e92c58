"""OpenRLHF: its real Ray actors on the CPU, in 16 bits or in float32, and the flags of its KL.

OpenRLHF computes in 16 bits only. So that it can be compared with hosts that compute in 32, :func:`know_float32` adds
one entry to the table of dtypes in its actors, and :func:`parsed_in` names that dtype in its parsed command line.
Everything else is OpenRLHF's own.
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
    """Prepare this process for OpenRLHF; to be called before anything imports it."""
    os.environ.update(ENVIRONMENT)
    sys.path.append(str(CPU_HOST))
    importlib.import_module("openrlhf_on_cpu").install()


@contextmanager
def session(*modules: ModuleType) -> Iterator[None]:
    """Start a Ray job with kl-plugins attached, which ends with the block.

    Args:
        modules: their functions travel to the actors by value.
    """
    prepare()
    import ray

    with local_cluster(attached=True):
        for module in modules:
            ray.cloudpickle.register_pickle_by_value(module)
        yield


def know_float32(host: harness.Harness) -> harness.Harness:
    """Make policy and reference actors know float32; gives the same actors."""
    import ray

    ray.cloudpickle.register_pickle_by_value(openrlhf_actor)
    for actor in host.policy._actor_handlers + host.reference._actor_handlers:
        ray.get(actor.__ray_call__.remote(openrlhf_actor.allow_float32))
    return host


def actors_of(assets: Path, ranks: int = 1) -> harness.Harness:
    """New actors that know float32; Ray must be initialised."""
    return know_float32(harness.Harness(assets, ranks))


@contextmanager
def parsed_in(dtype: str) -> Iterator[None]:
    """Within the block, what the harness starts computes in this dtype, such as `fp32`."""
    parse = harness.parse

    def parsed(*args: Any, **kwargs: Any) -> Any:
        found = parse(*args, **kwargs)
        found.ds.param_dtype = dtype
        return found

    with mock.patch.object(harness, "parse", parsed):
        yield


def kl_flags(kl: str, *, in_loss: bool, unbiased_gradient: bool = False) -> list[str]:
    """The flags of a KL on OpenRLHF's command line, without its coefficient.

    Args:
        kl: the spec, or OpenRLHF's name of an estimator.
        in_loss: whether the KL is a term of the loss.
        unbiased_gradient: OpenRLHF's flag of this name, for its own estimators.
    """
    found = ["--algo.kl.estimator", kl]
    if in_loss:
        found.append("--algo.kl.use_loss")
    return found + ["--algo.kl.unbiased_gradient"] * unbiased_gradient
