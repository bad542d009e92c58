"""The table of options in README is the one that the table in the code gives.

``python -m tests.packaging.test_readme_options`` brings README up to date.
"""

from __future__ import annotations

from pathlib import Path

from kl_plugins.explain.options import markdown_table

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN = "<!-- options: written by `python -m tests.packaging.test_readme_options` -->"
END = "<!-- end of options -->"


def with_table(text: str) -> str:
    """README with the table between its marks replaced by the one that the code gives."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"README.md has lost the mark {BEGIN}"
    assert end, f"README.md has lost the mark {END}"
    return f"{before}{BEGIN}\n\n{markdown_table()}\n\n{END}{after}"


def test_readme_shows_the_options_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run python -m tests.packaging.test_readme_options"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
