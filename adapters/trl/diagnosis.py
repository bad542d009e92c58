"""``kl-plugins doctor`` for TRL: versions and sources, read from disk without importing TRL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from kl_plugins.adapters.diagnosis import absent, installed_folder, source_findings, version_finding
from kl_plugins.adapters.trl import unsloth
from kl_plugins.adapters.trl.host import HOST
from kl_plugins.hosts import Finding


def diagnose() -> Sequence[Finding]:
    """Findings on the installed TRL; see :class:`kl_plugins.hosts.Finding`."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    try:
        found = version(HOST.distribution)
    except PackageNotFoundError:
        yield absent(HOST, "TRL")
        return
    yield version_finding(HOST, found)
    yield from _source_findings(found)
    if find_spec(unsloth.NAME) is not None:
        problem = (
            "installed; a process that imports it has its trainers in the place of TRL's, and no spec is used there"
        )
        yield Finding("warning", unsloth.NAME, problem, unsloth.REMEDY)


def _source_findings(found: str) -> Iterator[Finding]:
    from kl_plugins.patches.trl.fingerprints import FINGERPRINTS, read_fingerprints

    try:
        digests = read_fingerprints(installed_folder("trl"))
    except ModuleNotFoundError:
        yield Finding("fault", f"trl {found}", "installed, but its package folder is not importable", "reinstall trl")
        return
    yield from source_findings(HOST, found, digests, FINGERPRINTS)
