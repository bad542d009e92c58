"""``kl-plugins explain --host``: says what a config of a framework optimises, and what is wrong with it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from packaging.version import InvalidVersion, Version

from kl_plugins.cli.output import Page, Row, fail, print_json
from kl_plugins.explain.config import SEVERITIES, ConfigExplainer, ConfigExplanation
from kl_plugins.hosts import Host, discover_hosts
from kl_plugins.settings import UnreadableError

USAGE = """usage: kl-plugins explain --host HOST CONFIG... [--suggest] [--json] [--version X] [--length N]

Says what a run with this config optimises: estimator, placement, target, weight, aggregation, clamps, sampling, stale
data; and which settings are wrong, surprising or ignored. Nothing is imported or started.

  CONFIG      a file (YAML, JSON, shell script, Python, notebook), - for standard input, or arguments of the program:
              beta=0.04, --beta 0.04, "trl grpo --config x.yaml"; later ones replace earlier ones. Everything after --
              belongs to CONFIG.
  --host      {hosts}
  --suggest   also print settings to paste, and the equivalent beta
  --json      print one JSON document
  --version   the version of the host; by default the installed one, else the newest tested one
  --length    mean number of tokens of a response, for the equivalent beta

The exit status is 1 if there is a finding of severity error, 2 if CONFIG cannot be read, otherwise 0."""

_TAKE_VALUE = ("--host", "--version", "--length")
_FLAGS = ("--suggest", "--json", "--help", "-h")
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def explain_config_command(arguments: Sequence[str]) -> int:
    """Explain a config and print the result.

    Args:
        arguments: the words after ``explain``; ``--host`` is among them.

    Returns:
        The exit status: 1 if there is a finding of severity error; 2 for unknown hosts, unreadable input and wrong
        options; otherwise 0.
    """
    options, words = _split(arguments)
    as_json = "--json" in options
    hosts = {name: host for name, host in discover_hosts().hosts.items() if host.explainer}
    if "--help" in options or "-h" in options:
        print(USAGE.format(hosts=", ".join(hosts)))
        return 0
    host = hosts.get(options.get("--host", "").lower())
    if host is None:
        known = ", ".join(hosts)
        return fail(f"kl-plugins: no host {options.get('--host', '')!r} whose configs are known: {known}", as_json, 2)
    if not words:
        return fail("kl-plugins: explain --host needs a CONFIG: a file, or arguments of the program", as_json, 2)
    try:
        version, version_from = _version(host, options.get("--version"))
        length = _length(options.get("--length"))
        explainer = cast(ConfigExplainer, importlib.import_module(host.explainer))
        found = explainer.explain_config(words, version, version_from, length)
    except InvalidVersion as error:
        return fail(f"kl-plugins: --version: {error}", as_json, 2)
    except UnreadableError as error:
        return fail(f"kl-plugins: {error}", as_json, 2)
    suggest = "--suggest" in options
    if as_json:
        document = found.to_dict()
        if not suggest:
            del document["suggestions"]
        return print_json(document, found.status)
    _print(host, found, suggest, words)
    return found.status


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate our own options from the words of the config. Everything after ``--`` belongs to the config."""
    options: dict[str, str] = {}
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            words += rest
            break
        if name in _TAKE_VALUE:
            options[name] = value if equals else rest.pop(0) if rest else ""
        elif word in _FLAGS:
            options[word] = ""
        else:
            words.append(word)
    return options, words


def _length(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        length = float(given)
    except ValueError:
        length = 0.0
    if not 0 < length < float("inf"):
        raise UnreadableError(f"--length: {given!r} is no number of tokens")
    return length


def _version(host: Host, given: str | None) -> tuple[str, str]:
    if given is not None:
        return str(Version(given)), "given by --version"
    installed = host.installed_version()
    if installed is not None:
        return installed, "installed here"
    return host.tested[-1], f"{host.title} is not installed here; the newest tested version is assumed"


def _print(host: Host, found: ConfigExplanation, suggest: bool, words: Sequence[str]) -> None:
    page = Page()
    files = [word for word in words if Path(word).suffix and "=" not in word and not word.startswith("-")]
    page.title(f"{host.title} {found.version}, {found.algorithm}: {', '.join(files) or 'what was given'}")
    if not found.version_from.startswith("given"):
        page.paragraph(f"Version: {found.version_from}.", "dim")
    if not found.settings:
        page.paragraph("No setting about the KL was found in what was read; the defaults are explained.", "yellow")
    page.section("What this run optimises", found.statements.items())
    page.section("Findings", (row for severity in SEVERITIES for row in _rows(found, severity)), _STYLES)
    counts = {severity: sum(f.severity == severity for f in found.findings) for severity in SEVERITIES}
    if suggest:
        for suggestion in found.suggestions:
            page.section(suggestion.title, (("", line) for line in suggestion.lines))
            page.paragraph(suggestion.reason, "dim")
    page.paragraph(
        f"Errors: {counts['error']}. Warnings: {counts['warning']}. Notes: {counts['note']}."
        if found.findings
        else "No findings."
    )
    if not suggest and found.suggestions:
        page.paragraph("Settings to paste: add --suggest.", "dim")


def _rows(found: ConfigExplanation, severity: str) -> Iterator[Row]:
    for finding in found.findings:
        if finding.severity == severity:
            yield severity, f"{finding.rule}: {finding.statement}."
            if finding.setting:
                yield "", f"from: {finding.setting}"
            yield "", f"source: {finding.source}"
            if finding.remedy:
                yield "", f"-> {finding.remedy}"
