"""Whether this process and these arguments are ones that the hooks were checked with; asked when a spec is used."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from kl_plugins.adapters.diagnosis import installed_folder
from kl_plugins.patches import checks
from kl_plugins.patches.fingerprint import fingerprints_in_folder
from kl_plugins.patches.openrlhf import HOOKS
from kl_plugins.patches.openrlhf.fingerprints import FINGERPRINTS


def check_process() -> None:
    """Raise unless every hook that this process needs is in, on an OpenRLHF that was checked.

    Raises:
        UnsupportedHostError: unknown version, changed source, or a hook that is not in.
    """
    checks.check_process(HOOKS.patches(), HOOKS.failures, HOOKS.host)


def check_sources() -> None:
    """Raise where OpenRLHF's files are not those that were checked; reads them, so that the launcher finds out.

    Raises:
        UnsupportedHostError: a function that is wrapped in some process has changed.
    """
    checks.check_digests("openrlhf", _digests(), FINGERPRINTS)


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
        checks.refuse_untested(problem)


def _untested(args: Any) -> Iterator[str]:
    if args.ds.ring_attn_size > 1:
        yield "--ds.ring_attn_size > 1 was not tested; set it to 1"
    if args.ds.tensor_parallel_size > 1:
        yield "--ds.tensor_parallel_size > 1 was not tested; set it to 1"
    if args.data.max_images_per_prompt > 0:
        yield "--data.max_images_per_prompt > 0 was not tested; set it to 0"
