"""``kl-plugins doctor`` for TRL: versions and sources, read from disk without importing TRL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.trl.host import HOST
from kl_plugins.hosts import Finding


def diagnose() -> Sequence[Finding]:
    """Findings on the installed TRL; see :class:`kl_plugins.hosts.Finding`."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    try:
        found = version(HOST.distribution)
    except PackageNotFoundError:
        yield Finding("absent", "trl", "not installed", "pip install 'kl-plugins[trl]' if you train with TRL")
        return
    remedy = f"install trl{HOST.supported}, or set KL_PLUGINS_ALLOW_UNTESTED=1 and check the kl/ metrics yourself"
    if not SpecifierSet(HOST.supported).contains(found, prereleases=True):
        yield Finding("fault", f"trl {found}", f"outside the checked versions {HOST.supported}", remedy)
    elif found in HOST.tested:
        yield Finding("ok", f"trl {found}", "tested version")
    else:
        yield Finding("ok", f"trl {found}", f"sources checked; the test-suite runs {', '.join(HOST.tested)}")
    yield from _source_findings(found, remedy)


def _source_findings(found: str, remedy: str) -> Iterator[Finding]:
    from kl_plugins.patches.trl.fingerprints import FINGERPRINTS, read_fingerprints

    spec = PathFinder.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        yield Finding("fault", f"trl {found}", "installed, but its package folder is not importable", "reinstall trl")
        return
    digests = read_fingerprints(Path(next(iter(spec.submodule_search_locations))))
    changed = [name for name, digest in digests.items() if digest not in FINGERPRINTS[name].values()]
    for name in changed:
        yield Finding(
            "fault", f"trl {found} {name}", f"its source is not one that was checked ({digests[name]})", remedy
        )
    if not changed:
        yield Finding("ok", f"trl {found} sources", f"{len(digests)} wrapped functions have known fingerprints")
