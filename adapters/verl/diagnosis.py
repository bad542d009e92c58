"""``kl-plugins doctor`` for veRL: version, sources and entry points, read from disk without importing veRL."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version

from packaging.version import Version

from kl_plugins.adapters.diagnosis import absent, installed_folder, source_findings, version_finding
from kl_plugins.adapters.verl.host import HOST
from kl_plugins.hosts import Finding

GROUP, NAME = "verl.plugins", "kl_plugins"
"""Where veRL looks for plugins, and what ours is called there."""

FIRST_WITH_ENTRY_POINTS = Version("0.9.dev0")
MODULES, ENTRY = "VERL_USE_EXTERNAL_MODULES", "kl_plugins.patches.verl.entry"
"""Before that, veRL imports the modules that this variable lists."""


def diagnose() -> Sequence[Finding]:
    """Findings on the installed veRL; see :class:`kl_plugins.hosts.Finding`."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    try:
        found = version(HOST.distribution)
    except PackageNotFoundError:
        yield absent(HOST, "veRL")
        return
    verdict = version_finding(HOST, found)
    yield verdict
    if verdict.level == "fault":
        return
    yield from _source_findings(found)
    yield _entry_finding() if Version(found) >= FIRST_WITH_ENTRY_POINTS else _module_finding()


def _source_findings(found: str) -> Iterator[Finding]:
    from kl_plugins.patches.fingerprint import fingerprints_in_folder
    from kl_plugins.patches.verl.fingerprints import expected

    known = expected(found)
    try:
        digests = fingerprints_in_folder(installed_folder("verl"), known)
    except ModuleNotFoundError as error:
        yield Finding("fault", f"verl {found}", str(error), "reinstall verl")
        return
    yield from source_findings(HOST, found, digests, known)


def _module_finding() -> Finding:
    named = os.environ.get(MODULES, "").split(",")
    if ENTRY in (name.strip() for name in named):
        return Finding("ok", MODULES, ENTRY)
    return Finding(
        "fault",
        MODULES,
        "veRL before 0.9 looks for no entry points, so veRL imports no kl-plugins",
        f"set {MODULES}={ENTRY} (beside what it holds, with a comma) in every process, on every node",
    )


def _entry_finding() -> Finding:
    points = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not points:
        return Finding("fault", f"entry point {GROUP}", "veRL would not find kl-plugins", "reinstall kl-plugins")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and NAME not in (name.strip() for name in policy.split(",")):
        return Finding(
            "fault",
            "VERL_USE_EXTERNAL_PLUGINS",
            f"it is {policy!r}, so veRL imports no kl-plugins",
            f"unset it, or add {NAME} to it, in every process",
        )
    return Finding("ok", f"entry point {GROUP}", points[0].value)
