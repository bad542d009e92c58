"""``kl-plugins doctor`` for OpenRLHF: version and sources, read from disk without importing OpenRLHF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from kl_plugins.adapters.diagnosis import absent, installed_folder, source_findings, version_finding
from kl_plugins.adapters.openrlhf.host import HOST
from kl_plugins.hosts import Finding


def diagnose() -> Sequence[Finding]:
    """Findings on the installed OpenRLHF; see :class:`kl_plugins.hosts.Finding`."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    try:
        found = version(HOST.distribution)
    except PackageNotFoundError:
        yield absent(HOST, "OpenRLHF")
        return
    verdict = version_finding(HOST, found)
    yield verdict
    if verdict.level != "fault":
        yield from _source_findings(found)


def _source_findings(found: str) -> Iterator[Finding]:
    from kl_plugins.patches.fingerprint import fingerprints_in_folder
    from kl_plugins.patches.openrlhf.fingerprints import FINGERPRINTS

    try:
        digests = fingerprints_in_folder(installed_folder("openrlhf"), FINGERPRINTS)
    except ModuleNotFoundError as error:
        yield Finding("fault", f"openrlhf {found}", str(error), "reinstall openrlhf")
        return
    yield from source_findings(HOST, found, digests, FINGERPRINTS)
