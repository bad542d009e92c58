"""Whether this process and these arguments are ones that the hooks were checked with; asked when a spec is used."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

from kl_plugins.adapters.diagnosis import installed_folder
from kl_plugins.patches.fingerprint import fingerprints_in_folder
from kl_plugins.patches.openrlhf import HOOKS
from kl_plugins.patches.openrlhf.fingerprints import FINGERPRINTS
from kl_plugins.patches.patch import ALLOW_UNTESTED, Hook, UnsupportedHostError, check_version


def check_process() -> None:
    """Raise unless every hook that this process needs is in, on an OpenRLHF that was checked.

    Raises:
        UnsupportedHostError: unknown version, changed source, or a hook that is not in.
    """
    patches = HOOKS.patches()
    check_version(patches.distribution, patches.supported)
    if HOOKS.failures:
        raise UnsupportedHostError(
            f"kl-plugins: could not attach to OpenRLHF {version('openrlhf')}: "
            + "; ".join(HOOKS.failures)
            + ". Run `kl-plugins doctor`"
        )
    imported = [patch for patch in patches.patches if patch.module in sys.modules]
    patches.check(imported)
    for patch in imported:
        if not isinstance(vars(patch.owner()).get(patch.attribute), Hook):
            raise UnsupportedHostError(
                f"kl-plugins: {patch.module}.{patch.qualname} has no hook in this process: something replaced it, or "
                "kl-plugins was detached. A KL spec would have no effect there"
            )


def check_sources() -> None:
    """Raise where OpenRLHF's files are not those that were checked; reads them, so that the launcher finds out.

    Raises:
        UnsupportedHostError: a function that is wrapped in some process has changed.
    """
    for name, digest in _digests().items():
        if digest not in FINGERPRINTS[name].values():
            _refuse(
                f"{name.replace(':', '.')} of openrlhf {version('openrlhf')} is not the code that kl-plugins was "
                f"checked with (fingerprint {digest}); it was edited, or this is another version"
            )


@cache
def _digests() -> dict[str, str | None]:
    return fingerprints_in_folder(installed_folder("openrlhf"), FINGERPRINTS)


def check_parts(args: Any) -> None:
    """Raise where the arguments pick parts of OpenRLHF that the hooks were not run with.

    Args:
        args: OpenRLHF's nested arguments.

    Raises:
        UnsupportedHostError: the part, by its flag.
    """
    for problem in _untested(args):
        _refuse(problem)


def _untested(args: Any) -> Iterator[str]:
    if args.ds.ring_attn_size > 1:
        yield "--ds.ring_attn_size > 1 was not tested; set it to 1"
    if args.ds.tensor_parallel_size > 1:
        yield "--ds.tensor_parallel_size > 1 was not tested; set it to 1"
    if args.data.max_images_per_prompt > 0:
        yield "--data.max_images_per_prompt > 0 was not tested; set it to 0"


def _refuse(problem: str) -> None:
    if os.environ.get(ALLOW_UNTESTED) == "1":
        warnings.warn(f"kl-plugins: {problem}; going on because {ALLOW_UNTESTED}=1", RuntimeWarning, stacklevel=3)
        return
    raise UnsupportedHostError(
        f"kl-plugins: {problem}. Or set {ALLOW_UNTESTED}=1 in every process and check the run's kl/ metrics yourself."
    )
