"""Whether a process and its host are what the hooks were checked with; asked when a spec is used. Knows no host."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from kl_plugins.patches.guards import ALLOW_UNTESTED, UnsupportedHostError, check_version, refuse
from kl_plugins.patches.patch import Hook, PatchSet


def check_process(patches: PatchSet, failures: Sequence[str], host: str) -> None:
    """Raise unless every hook that this process needs is in, on a host that was checked.

    Args:
        patches: the host's; a process needs those of the modules that it has imported.
        failures: hooks that could not be put in.
        host: its name in messages.

    Raises:
        UnsupportedHostError: unknown version, changed source, or a hook that is not in.
    """
    found = check_version(patches.distribution, patches.supported)
    if failures:
        raise UnsupportedHostError(
            f"kl-plugins: could not attach to {host} {found}: {'; '.join(failures)}. Run `kl-plugins doctor`"
        )
    imported = [patch for patch in patches.patches if patch.module in sys.modules]
    patches.check(imported)
    for patch in imported:
        if not isinstance(vars(patch.owner()).get(patch.attribute), Hook):
            raise UnsupportedHostError(
                f"kl-plugins: {patch.module}.{patch.qualname} has no hook in this process: something replaced it, or "
                "kl-plugins was detached. A KL spec would have no effect there"
            )


def check_digests(distribution: str, digests: Mapping[str, str | None], known: Mapping[str, Mapping[str, str]]) -> None:
    """Raise where the host's files are not those that were checked, imported or not.

    Args:
        distribution: the host's name on the package index.
        digests: fingerprint by ``module:qualname``, as installed; None where the function is gone.
        known: checked fingerprints by function and version.

    Raises:
        UnsupportedHostError: a function that is wrapped in some process has changed.
    """
    for name, versions in known.items():
        if digests[name] not in versions.values():
            refuse_untested(
                f"{name.replace(':', '.')} of {distribution} {version(distribution)} is not the code that kl-plugins "
                f"was checked with (fingerprint {digests[name]}); it was edited, or this is another version"
            )


def refuse_untested(problem: str) -> None:
    """Raise for a part of the host that the tests do not run, unless the user allows it.

    Raises:
        UnsupportedHostError: the problem, and how to go on in spite of it.
    """
    refuse(problem, f"Or set {ALLOW_UNTESTED}=1 in every process and check the run's kl/ metrics yourself.")
