"""``kl-plugins doctor``: checks what is installed and whether the versions fit, and proposes remedies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kl_plugins import __version__
from kl_plugins.cli.backends import backend_findings
from kl_plugins.cli.output import Page, fail, print_json
from kl_plugins.cli.running import install_remedy
from kl_plugins.hosts import Finding, Host, HostModule, discover_hosts
from kl_plugins.settings import UnreadableError

OLDEST_TORCH = "2.6"
_STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "fault": "bold red"}


def doctor_command(as_json: bool, config: str | None = None) -> int:
    """Check the installation and print the findings.

    Args:
        as_json: whether to print JSON instead of text.
        config: a file with the settings of a run, whose sampling settings are explained; ``-`` reads standard input;
            None explains none.

    Returns:
        The exit status: 1 if there is a fault, 2 if the config cannot be read, otherwise 0.
    """
    try:
        text = None if config is None else sys.stdin.read() if config == "-" else Path(config).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return fail(f"kl-plugins: cannot read {config}: {error}", as_json, 2)
    try:
        sampling = [] if text is None else list(_sampling_findings(text, Path(config or "").suffix.lower()))
    except UnreadableError as error:
        return fail(f"kl-plugins: {config}: {error}", as_json, 2)
    sections = {
        "environment": [*_package_findings(), *_estimator_findings()],
        "backends": list(backend_findings()),
        "hosts": list(_host_findings()),
        **({} if text is None else {"sampling": sampling}),
    }
    found = [finding for findings in sections.values() for finding in findings]
    faults = sum(finding.level == "fault" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    status = 1 if faults else 0
    if as_json:
        document: dict[str, Any] = {
            name: [asdict(finding) for finding in findings] for name, findings in sections.items()
        }
        return print_json({**document, "faults": faults, "warnings": warnings}, status)
    page = Page()
    page.title(f"kl-plugins {__version__}")
    for name, findings in sections.items():
        page.section(name.capitalize(), (row for finding in findings for row in _rows(finding)), _STYLES)
    page.paragraph(f"Faults: {faults}. Warnings: {warnings}." if faults or warnings else "No problems found.")
    return status


def _rows(finding: Finding) -> Iterator[tuple[str, str]]:
    yield finding.level, f"{finding.subject}: {finding.message}"
    if finding.remedy and finding.level != "ok":
        yield "", f"-> {finding.remedy}"


def _package_findings() -> Iterator[Finding]:
    import platform

    yield Finding("ok", "python", platform.python_version())
    yield _own_finding()
    yield _torch_finding()


def _own_finding() -> Finding:
    try:
        installed = version("kl-plugins")
    except PackageNotFoundError:
        remedy = "run `pip install .` in its source folder"
        return Finding("fault", "kl-plugins", "imported but not installed, so no host can be found", remedy)
    if installed != __version__:
        return Finding(
            "warning",
            "kl-plugins",
            f"the installed metadata have version {installed}, but the imported code has version {__version__}",
            "install kl-plugins again, so that both have the same version",
        )
    return Finding("ok", "kl-plugins", __version__)


def _torch_finding() -> Finding:
    from packaging.version import Version

    try:
        import torch
    except Exception as error:  # a broken installation can raise other errors than ImportError, for example OSError
        return Finding("fault", "torch", f"cannot be imported: {error}", f'pip install "torch>={OLDEST_TORCH}"')
    if Version(torch.__version__).release < Version(OLDEST_TORCH).release:
        remedy = f'pip install "torch>={OLDEST_TORCH}"'
        return Finding("fault", "torch", f"{torch.__version__} is older than {OLDEST_TORCH}", remedy)
    device = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "no CUDA device"
    return Finding("ok", "torch", f"{torch.__version__}, {device}")


def _estimator_findings() -> Iterator[Finding]:
    from kl_plugins.estimators import BUILT_IN, all_estimators

    try:
        added = [row.name for row in all_estimators() if row.name not in BUILT_IN]
    except RuntimeError as error:
        yield Finding("fault", "estimators", str(error), "repair or uninstall that package")
        return
    yield Finding("ok", "estimators", f"{len(BUILT_IN)} built in; registered: {', '.join(added) or 'none'}")


def _host_findings() -> Iterator[Finding]:
    registry = discover_hosts()
    for broken in registry.broken:
        yield Finding("fault", broken.name, f"cannot be loaded: {broken}", f"repair or uninstall {broken.distribution}")
    for host in registry.hosts.values():
        installed = host.installed_version()
        if installed is None:
            yield Finding("absent", host.name, f"not installed; supported {host.supported}", install_remedy(host))
        else:
            own = list(_diagnosis(host))
            general = version_finding(host, installed)
            # Some adapters check the version of their host themselves, and say more. Then only their finding is shown.
            yield from own if any(finding.subject == general.subject for finding in own) else [general, *own]


def _sampling_findings(text: str, suffix: str) -> Iterator[Finding]:
    from kl_plugins.sampling import EFFECTS, PRODUCTS, read_text

    sampling = read_text(text, suffix)
    if sampling.truncated:
        yield Finding(
            "warning",
            "truncated sampling",
            f"{sampling}: the sampler's distribution is not the policy whose log-probs the trainer computes; {EFFECTS}",
            f"sample the whole distribution (top_p 1, no top_k, no min_p); with these settings a run refuses "
            f"is:{', is:'.join(PRODUCTS)} against the sampler",
        )
    if sampling.raw and (sampling.truncated or sampling.penalised or sampling.temperature != 1):
        yield Finding(
            "warning",
            "raw log-probs",
            "the engine reports the log-probs of a distribution that is not the one that it samples from",
            "set logprobs_mode to processed_logprobs, or use behaviour:old in the spec",
        )
    if not sampling.truncated and not sampling.raw:
        yield Finding("ok", "sampling", str(sampling))


def version_finding(host: Host, installed: str) -> Finding:
    """Return a finding on whether the installed version of a host is supported and tested.

    Args:
        host: the descriptor of the host.
        installed: the installed version.
    """
    from packaging.specifiers import SpecifierSet

    subject = f"{host.name} {installed}"
    if not SpecifierSet(host.supported).contains(installed, prereleases=True):
        return Finding("fault", subject, f"outside the supported range {host.supported}", install_remedy(host))
    if installed in host.tested:
        return Finding("ok", subject, "supported and tested")
    return Finding("ok", subject, f"supported; tested versions are {', '.join(host.tested)}")


def _diagnosis(host: Host) -> Iterator[Finding]:
    subject = f"{host.name} adapter"
    try:
        adapter: HostModule = host.load()
        yield from adapter.diagnose()
    except Exception as error:  # doctor must also work with a broken installation, so it shows the error
        message = f"{host.module} fails: {type(error).__name__}: {error}"
        yield Finding("fault", subject, message, "install kl-plugins again, or report this with the lines above")
