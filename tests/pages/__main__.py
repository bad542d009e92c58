"""Writes every generated part of the documentation into its page."""

from __future__ import annotations

from tests.pages import configs
from tests.pages.parts import renewed_pages
from tests.pages.register import PARTS

if __name__ == "__main__":
    for path, text in renewed_pages(PARTS).items():
        path.write_text(text, encoding="utf-8")
    configs.PICTURE.write_text(configs.picture(), encoding="utf-8")
