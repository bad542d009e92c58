"""Is the installed host one whose sources were checked? By version, and by fingerprints of its functions."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from packaging.specifiers import SpecifierSet

from kl_plugins.patches.fingerprint import fingerprint

ALLOW_UNTESTED = "KL_PLUGINS_ALLOW_UNTESTED"
"""Environment variable: set to 1, an unknown host version or changed source is a warning instead of an error."""


class UnsupportedHostError(RuntimeError):
    """The installed host is not one whose sources were checked: version out of range, or code changed."""


def check_version(distribution: str, supported: SpecifierSet) -> str:
    """The installed version of a host.

    Raises:
        UnsupportedHostError: it is outside ``supported``.
        ModuleNotFoundError: it is not installed.
    """
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"kl-plugins: {distribution} is not installed here; it supports {supported}"
        ) from None
    if not supported.contains(version, prereleases=True):
        problem = f"{distribution} {version} is not among the versions that were checked ({supported})"
        refuse(problem, _install_or_allow(supported))
    return version


def check_source(
    name: str,
    function: Callable[..., Any],
    fingerprints: Mapping[str, str],
    host: str,
    supported: SpecifierSet,
) -> None:
    """Raise where a host function is not the code that a patch was written for.

    Args:
        name: dotted name of the function.
        function: it.
        fingerprints: digests of the sources that were checked; none: the source is not looked at.
        host: name and version.
        supported: versions whose sources were checked.

    Raises:
        UnsupportedHostError: the fingerprint is none of the known ones.
    """
    if not fingerprints:
        return
    try:
        found = fingerprint(function)
    except (OSError, TypeError) as error:
        found = f"unreadable ({error})"
    if found not in fingerprints.values():
        refuse(
            f"{name} of {host} is not the code that kl-plugins was checked with (fingerprint {found}); it was edited, "
            "or another package has replaced it",
            _install_or_allow(supported),
        )


def refuse(problem: str, remedy: str) -> None:
    """Raise for a host that was not checked; where the user allows that, warn.

    Raises:
        UnsupportedHostError: the problem and its remedy.
    """
    if os.environ.get(ALLOW_UNTESTED) == "1":
        warnings.warn(f"kl-plugins: {problem}; going on because {ALLOW_UNTESTED}=1", RuntimeWarning, stacklevel=3)
        return
    raise UnsupportedHostError(f"kl-plugins: {problem}. {remedy}")


def _install_or_allow(supported: SpecifierSet) -> str:
    return f"Install a version in {supported}, or set {ALLOW_UNTESTED}=1 and check the run's kl/ metrics yourself."
