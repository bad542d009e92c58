"""``kl-plugins run``: finds the host of a program and passes the arguments on unchanged."""

from __future__ import annotations

from collections.abc import Sequence

from kl_plugins.cli.output import fail, fail_spec
from kl_plugins.hosts import Host, HostRegistry, discover_hosts
from kl_plugins.spec import KLSpecError
from kl_plugins.spec.errors import nearest_word


def run_command(module: str, arguments: Sequence[str]) -> int:
    """Run a program of a host with kl-plugins attached.

    Args:
        module: the name of a host, or a dotted module of one of its packages.
        arguments: the arguments of the program; they are passed on unchanged.

    Returns:
        The exit status of the program; 2 if the host is unknown or not installed; 1 if its adapter is broken.
    """
    registry = discover_hosts()
    host = find_host(module, registry)
    if host is None:
        return fail(_unknown(module, registry), False, 2)
    if host.installed_version() is None:
        return fail(f"kl-plugins: {host.name} is not installed. Install it with: {install_remedy(host)}", False, 2)
    try:
        adapter = host.load()
    except ImportError as error:
        return fail(
            f"kl-plugins: the adapter of {host.name} ({host.module}) cannot be imported: {error}. "
            "Run kl-plugins doctor for details.",
            False,
            1,
        )
    try:
        return adapter.run(module, list(arguments))
    except KLSpecError as error:  # the error is in the user's text, and a traceback would only hide the message
        return fail_spec(error, as_json=False)


def find_host(module: str, registry: HostRegistry) -> Host | None:
    """Return the host that is called ``module`` or owns its top-level package, or None if there is none.

    Args:
        module: the name of a host, or the dotted path of a module.
        registry: the hosts to choose from.
    """
    package = module.partition(".")[0]
    for name, host in registry.hosts.items():
        if module == name or package in host.packages:
            return host
    return None


def install_remedy(host: Host) -> str:
    """Return the command that installs a supported version of the host."""
    return f'pip install "{host.distribution}{host.supported}"'


def _unknown(module: str, registry: HostRegistry) -> str:
    names = {name: ", ".join(host.packages) for name, host in registry.hosts.items()}
    lines = [f"kl-plugins: no host has the name {module!r} or contains that module"]
    known = "; ".join(f"{name} (packages: {packages})" for name, packages in names.items())
    lines.append(f"  hosts: {known or 'none registered'}")
    lines += [f"  broken: {host}" for host in registry.broken]
    near = nearest_word(module.partition(".")[0], names)
    if near:
        lines.append(f"  did you mean: {near}")
    return "\n".join(lines)
