"""OpenRLHF in float32.

OpenRLHF computes in 16 bits only. So that it can be compared with hosts that compute in 32, its table of dtypes is
given one entry more in its actors, and its parsed command line names it; all else is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.hosts import openrlhf_watch
from tests.support.openrlhf import harness


def know_float32(host: harness.Harness) -> harness.Harness:
    """The same policy and reference actors, which now know the dtype."""
    import ray

    ray.cloudpickle.register_pickle_by_value(openrlhf_watch)
    for actor in host.policy._actor_handlers + host.reference._actor_handlers:
        ray.get(actor.__ray_call__.remote(openrlhf_watch.allow_float32))
    return host


def actors_of(assets: Path, ranks: int = 1) -> harness.Harness:
    """New actors that know it; Ray must be initialised."""
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
