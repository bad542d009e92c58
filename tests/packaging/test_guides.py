"""Tests that the specs in the hand-written guides are valid, and that README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kl_plugins.spec import KLSpec, looks_like_spec
from tests.packaging import choose_figure

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("index", "choose", "faq", "exact", "claims", "quickstart/trl", "quickstart/verl", "quickstart/openrlhf")
GUIDES = ["README.md", *(f"docs/{page}.md" for page in PAGES)]
SPEC = re.compile(r"[`\"= ](?P<text>[a-z0-9+.-]+@(?:loss|reward|advantage)[a-z0-9:./+-]*)")
BIASED = ("k1@loss", "k3@reward")
LONGEST = 150


def specs_in(text: str) -> list[str]:
    return [found["text"].rstrip(".,:") for found in SPEC.finditer(text)]


@pytest.mark.parametrize("page", GUIDES)
def test_every_spec_in_a_guide_is_valid(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for spec in specs_in(text):
        # Guides often name a spec that estimates no divergence without allow:biased, which only a run needs.
        assert KLSpec.parse(f"{spec}/allow:biased" if spec in BIASED else spec)


def test_the_figure_names_valid_specs_and_is_up_to_date() -> None:
    for step in choose_figure.STEPS:
        for spec, _ in step.answers:
            assert looks_like_spec(spec)
            assert KLSpec.parse(spec)
    drawn = choose_figure.draw()
    assert choose_figure.FIGURE.read_text(encoding="utf-8") == drawn, "run python -m tests.packaging.choose_figure"


def test_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST
