"""The command `python -m benchmarks.report`: makes one self-contained HTML page from all existing results."""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment
from rich.console import Console

from benchmarks.report.sections import Found, find

TEMPLATE = Path(__file__).with_name("page.html")
MIME = {".png": "image/png", ".svg": "image/svg+xml"}
NEVER = (
    "Models of more than some million parameters, natural-language rewards, and runs of many thousand updates.",
    "Several nodes: what grows with ranks is counted in processes of one machine.",
    "GPUs, unless a section above names one.",
)


def render(root: Path) -> tuple[str, list[Found]]:
    """Return the HTML of the page, and the sections that it was made from.

    Args:
        root: folder with one folder per benchmark.
    """
    sections = find(root)
    shown = [{"section": f.section, **{k: getattr(f, k) for k in _KEYS}, "images": _images(f)} for f in sections]
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    made = f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC"
    return page.render(sections=shown, root=str(root), made=made, never=NEVER), sections


_KEYS = ("tables", "verdicts", "commands", "machines", "broken", "measured")


def _images(found: Found) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "data": f"data:{MIME[p.suffix]};base64,{base64.b64encode(p.read_bytes()).decode()}"}
        for p in found.figures
    ]


def main(
    root: Annotated[Path, typer.Option(help="Folder with the results of the benchmarks.")] = Path("out/bench"),
    out: Annotated[Path | None, typer.Option(help="The page; report.html in the root by default.")] = None,
) -> None:
    """Write one self-contained HTML page from all existing results, and print which ones are missing."""
    console, target = Console(), out or root / "report.html"
    page, sections = render(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    for found in sections:
        state = f"{len(found.tables)} tables, {len(found.figures)} figures" if found.measured else "not measured here"
        console.print(f"{found.section.name}: {state}")
        for line in found.broken:
            console.print(f"  could not be read: {line}", style="red", markup=False)
    console.print(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
