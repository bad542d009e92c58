"""Generates ``docs/faults.md`` from the table of the contract; run it by ``python -m tests.contract.document``."""

from __future__ import annotations

from pathlib import Path

from tests.contract.table import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"

HEAD = """# What happens when something goes wrong

This page is generated from the table in `tests/contract/table.py`; change it there, then run
`python -m tests.contract.document`. Every row is a test that runs on the real update function of TRL, veRL and OpenRLHF
(`tests/<host>/test_contract.py`), and the row about a whole program runs the host's own program.

These terms are used. The *policy* is the model in training. The *reference* is the model to which the KL is measured.
The *sampler* is the engine that generated the responses. The *old policy* is the trainer's own policy at that time. The
*weight* is the importance weight policy/sampler or policy/old, which options such as `is:token` put on the KL term. A
*receipt* is the line that every process logs before the first update. If a run *stops*, an error ends it, either in the
process itself or through Ray in the trainer.

| situation | what you see | what is kept |
|---|---|---|
"""


def page() -> str:
    """Return the text of the page."""
    return HEAD + "".join(f"| {row.happens} | {row.sees} | {row.kept} |\n" for row in ROWS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
