"""Tests that the documentation is current and complete: generated parts, public names, links and anchors.

They do not need MkDocs.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kl_plugins
from kl_plugins import metrics
from kl_plugins.hosts import discover_hosts
from tests.pages import refusals
from tests.pages.messages import messages_in
from tests.pages.parts import DOCS, renewed_pages
from tests.pages.register import HOSTS, PARTS

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(\s*<?(?P<target>[^)\s>]*)>?[^)]*\)")
FENCE = re.compile(r"^ *(?:```|~~~).*?^ *(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)
PUBLIC = (
    "kl_plugins/__init__.py",
    "kl_plugins/spec/__init__.py",
    "kl_plugins/explain/__init__.py",
    *(f"adapters/{host}/__init__.py" for host in HOSTS),
)


@pytest.mark.parametrize("path", sorted({part.path for part in PARTS}), ids=lambda path: path.stem)
def test_generated_parts_are_current(path: Path) -> None:
    parts = [part for part in PARTS if part.path == path]
    assert path.read_text(encoding="utf-8") == renewed_pages(parts)[path], "run python -m tests.pages"


def public_names(file: str) -> list[str]:
    if file == "kl_plugins/__init__.py":
        return list(kl_plugins.__all__)
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{file} has no __all__")


@pytest.mark.parametrize("file", PUBLIC)
def test_every_public_name_is_on_an_api_page(file: str) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    module = file.removesuffix("/__init__.py").replace("adapters", "kl_plugins.adapters").replace("/", ".")
    documented = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for name in public_names(file):
        if module.startswith("kl_plugins.adapters"):
            assert f"{module}.{name}" in documented or f"`{name}`" in text, f"{module}.{name} is on no page of docs/api"
        else:
            found = any(entry.endswith(f".{name}") for entry in documented)
            assert found or f"kl_plugins.{name}`" in text, f"{module}.{name} is on no page of docs/api"


@pytest.mark.parametrize("host", HOSTS)
def test_every_refusal_is_on_the_page_of_its_host(host: str) -> None:
    text = (DOCS / "hosts" / f"{host}.md").read_text(encoding="utf-8")
    found = refusals.of_host(host)
    assert len(found) >= 15
    assert all(refusals.cells(message)[0] in text for message in found)


def test_messages_are_read_with_their_constants() -> None:
    found = [message.text for message in messages_in("adapters/openrlhf/refusals.py")]
    assert any(text.startswith("--algo.kl.init_coef is 0, so OpenRLHF loads no reference model") for text in found)


def test_every_metric_has_a_meaning() -> None:
    assert metrics.MEANINGS.keys() == metrics.REDUCTIONS.keys()


def slug(heading: str) -> str:
    """Return the anchor that Python-Markdown gives to a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[`*]|\$", "", text)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


@cache
def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE):
        named = re.search(r"\{ *#([\w-]+)[^}]*\}$", heading)
        found.add(named[1] if named else slug(heading))
    return found | set(re.findall(r'id="([^"]+)"', text))


def links(path: Path) -> Iterator[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    text = re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text)
    for found in LINK.finditer(text):
        # The hosting service resolves ../../actions/ relative to the page on which it shows README.
        elsewhere = ("mailto:", "../../actions/")
        if found["target"] and "://" not in found["target"] and not found["target"].startswith(elsewhere):
            yield found["target"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_resolve(path: Path) -> None:
    for link in links(path):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name}: {link} leads nowhere"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{path.name}: {link}: no such heading"


@pytest.mark.parametrize("host", HOSTS)
def test_the_matrix_names_every_tested_version(host: str) -> None:
    found = discover_hosts().hosts[host]
    text = (DOCS / "hosts" / "compatibility.md").read_text(encoding="utf-8")
    assert all(version in text for version in found.tested)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md\b", text[text.index("\nnav:") :]))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert listed == there
