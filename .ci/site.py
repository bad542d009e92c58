"""Hooks of the build of the documentation (``mkdocs.yml``): location of the sources, links out of docs/, and formulas.

API pages are made from the text of the sources, which are not imported, so the build does not need PyTorch. The three
source folders are linked into one package, as they are for mypy, because they are installed as one package. MathJax is
copied from an installed package, so that the site loads nothing from another server.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TREE = ROOT / "build" / "docs"
"""Folder in which mkdocstrings finds the package; the same path is in ``mkdocs.yml``."""

LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):<code>(?:~(?:\w+\.)*)?")
TOGETHER = re.compile(
    r"<b><code>(?:<[^>]+>)*(?P<first>\w+),(?:<[^>]+>)*</code></b>\s*"
    r"\(<code>\(?(?P<others>(?:(?:<[^>]+>)*\w+(?:<[^>]+>)*(?:, )?)+)\)?(?:<[^>]+>)*</code>\)"
)
"""HTML of arguments that share one line of a docstring, such as ``a, b: ...``.

The parser of docstrings reads the second and the later names as a type.
"""
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
LONG = re.compile(r"(?<![\w/=.:@&])[\w/=.:@+-]{16,}(?=[^<>]*<)")
JOINT = re.compile(r"(?<=[/=_.])(?=\w{2})")
MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2")


def on_startup(command: str, dirty: bool) -> None:
    """Link the source folders into one package, before mkdocstrings looks for it: it drops a folder that is missing."""
    sys.path.insert(0, str(ROOT / ".ci"))
    from typecheck import link_tree

    link_tree(TREE / "kl_plugins")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make links to files outside docs/ lead to the repository, or make them plain text if its address is not known."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        target = link["target"]
        path = (DOCS / folder / target).resolve()
        if "://" in target or target.startswith("mailto:") or path.is_relative_to(DOCS) or not path.exists():
            return link[0]
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT)})"
        return f'<span class="repository" title="{path.relative_to(ROOT)}">{link["text"]}</span>'

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join(pieces) + LINK.sub(replaced, markdown[end:])


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Remove the roles of docstrings, join shared names of arguments, and allow line breaks in long settings in tables.

    A setting may break only after ``/``, ``=``, ``_`` and a full stop.
    """
    html = ROLE.sub("<code>", html)
    html = TOGETHER.sub(_names, html)
    return CELL.sub(lambda cell: LONG.sub(lambda word: JOINT.sub("<wbr>", word[0]), cell[0]), html)


def _names(found: re.Match[str]) -> str:
    return f"<b><code>{found['first']}, {re.sub('<[^>]+>', '', found['others'])}</code></b>"


def on_post_build(config: Any) -> None:
    """Copy MathJax and its fonts into the site."""
    found = importlib.util.find_spec("mathjax")
    if found is None or found.origin is None:
        raise SystemExit("MathJax is not installed; run `make docs`, which makes an environment that has it")
    source, target = Path(found.origin).parent / "static" / "mathjax" / "es5", Path(config.site_dir) / "mathjax"
    for name in MATHJAX:
        origin, copy = source / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, copy, dirs_exist_ok=True)
        else:
            shutil.copyfile(origin, copy)
