"""Hosts, and parts of hosts, that kl-plugins was not checked with: an error, or a warning if the user allows it."""

from __future__ import annotations

import importlib.metadata
import os
import warnings

from packaging.specifiers import SpecifierSet

ALLOW_UNTESTED = "KL_PLUGINS_ALLOW_UNTESTED"
"""Environment variable: set to 1, an unknown host version or changed source is a warning instead of an error."""


class UnsupportedHostError(RuntimeError):
    """The installed host is not one whose sources were checked: its version is out of range, or its code changed."""


def check_version(distribution: str, supported: str) -> str:
    """Return the installed version of a host, if it is a checked one.

    Args:
        distribution: the host's name on the package index.
        supported: PEP 440 specifier of the versions whose sources were checked.

    Raises:
        UnsupportedHostError: the version is outside ``supported``.
        ModuleNotFoundError: the host is not installed.
    """
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"kl-plugins: {distribution} is not installed here; it supports {SpecifierSet(supported)}"
        ) from None
    if not SpecifierSet(supported).contains(version, prereleases=True):
        problem = f"{distribution} {version} is not among the versions that were checked ({SpecifierSet(supported)})"
        refuse(problem, install_or_allow(supported))
    return version


def install_or_allow(supported: str) -> str:
    """What a user can do about a host that was not checked."""
    return (
        f"Install a version in {SpecifierSet(supported)}, or set {ALLOW_UNTESTED}=1 and check the run's kl/ metrics "
        "yourself."
    )


def refuse_untested(problem: str) -> None:
    """Raise for a part of the host that the tests do not run; warn if the user allows it.

    Raises:
        UnsupportedHostError: the problem, and how to go on in spite of it.
    """
    refuse(problem, f"Or set {ALLOW_UNTESTED}=1 in every process and check the run's kl/ metrics yourself.")


def refuse(problem: str, remedy: str) -> None:
    """Raise for a host that was not checked; warn if the user allows it.

    Raises:
        UnsupportedHostError: the problem and its remedy.
    """
    if os.environ.get(ALLOW_UNTESTED) == "1":
        warnings.warn(f"kl-plugins: {problem}; going on because {ALLOW_UNTESTED}=1", RuntimeWarning, stacklevel=3)
        return
    raise UnsupportedHostError(f"kl-plugins: {problem}. {remedy}")
