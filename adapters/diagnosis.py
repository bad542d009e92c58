"""What ``kl-plugins doctor`` says of any host's version and sources; imports no host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.specifiers import SpecifierSet

from kl_plugins.hosts import Finding, Host


def absent(host: Host, title: str) -> Finding:
    """The finding on a host that is not installed; ``title`` is how the host spells its name."""
    command = f'pip install "{host.distribution}{host.supported}"'
    return Finding("absent", host.name, "not installed", f"{command} if you train with {title}")


def remedy(host: Host) -> str:
    """What to do about a version or source that was not checked."""
    return (
        f"install {host.distribution}{host.supported}, or set KL_PLUGINS_ALLOW_UNTESTED=1 and check the kl/ metrics "
        "yourself"
    )


def version_finding(host: Host, found: str) -> Finding:
    """Whether the installed version is a tested one, a checked one, or neither."""
    subject = f"{host.name} {found}"
    if not SpecifierSet(host.supported).contains(found, prereleases=True):
        return Finding("fault", subject, f"outside the checked versions {host.supported}", remedy(host))
    if found in host.tested:
        return Finding("ok", subject, "tested version")
    return Finding("ok", subject, f"sources checked; the test-suite runs {', '.join(host.tested)}")


def source_findings(
    host: Host, found: str, digests: Mapping[str, str | None], known: Mapping[str, Mapping[str, str]]
) -> Iterator[Finding]:
    """Each wrapped function whose source is not a checked one, or one line that all are.

    Args:
        host: the host.
        found: its installed version.
        digests: fingerprint by function, as installed; None where the function is gone.
        known: checked fingerprints by function and version.
    """
    subject = f"{host.name} {found}"
    changed = [name for name, digest in digests.items() if digest not in known[name].values()]
    for name in changed:
        problem = f"its source is not one that was checked ({digests[name]})"
        yield Finding("fault", f"{subject} {name}", problem, remedy(host))
    if not changed:
        yield Finding("ok", f"{subject} sources", f"{len(digests)} wrapped functions have known fingerprints")


def installed_folder(package: str) -> Path:
    """Where a host's package lies, without importing it.

    Raises:
        ModuleNotFoundError: nowhere.
    """
    spec = PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"kl-plugins: the package folder of {package} is not importable; reinstall it")
    return Path(next(iter(spec.submodule_search_locations)))
