"""The picture of the page about configs shows what the command prints today, and loads nothing from elsewhere."""

from __future__ import annotations

from tests.pages import configs


def test_the_picture_is_current() -> None:
    assert configs.PICTURE.read_text("utf-8") == configs.picture(), "run python -m tests.pages"


def test_the_picture_fetches_nothing() -> None:
    text = configs.PICTURE.read_text("utf-8")
    assert "@import" not in text
    assert "url(http" not in text
    assert "src:" not in text
