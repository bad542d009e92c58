"""The sections of the report, one per benchmark: location, meaning and limits of its results, and how to read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report.tables import Table, flat, overhead_tables, staleness_tables, study_tables, tables_of


@dataclass(frozen=True)
class Section:
    """The section of one benchmark.

    Attributes:
        name: name of its folder under the root.
        title: heading of the section.
        question: what the benchmark measures.
        command: the command that makes its results.
        limits: what its numbers do not show.
        files: glob pattern of its JSON files.
        tables: makes tables from the content of one file.
    """

    name: str
    title: str
    question: str
    command: str
    limits: str
    files: str = "*.json"
    tables: Callable[[dict[str, Any]], list[Table]] = tables_of


SECTIONS = (
    Section(
        "study", "Published claims in real RL runs",
        "Does each regulariser have the effect on a policy that the papers claim, with fresh data and with stale data? "
        "Every claim has a test that was written before the runs: an effect per seed, its 95 % interval, a threshold.",
        "make bench-study", "Small models on tasks with a verified reward, one update per rollout. A verdict says "
        "whether an effect exists at this scale and these settings, not how large it is at another. Intervals are "
        "per test: one of twenty true null hypotheses is expected to be rejected.", "study.json", study_tables,
    ),
    Section(
        "hosts", "One spec, three hosts",
        "The same rollouts through the real update path of TRL, veRL and OpenRLHF: the coefficient applied to each "
        "token, the aggregated KL loss and the gradient, each host's documented normalisation divided out.",
        "make bench-hosts", "One batch and a small model; the comparison is of one update, not of a training run.",
        "parity.json",
    ),
    Section(
        "overhead", "Cost of a step", "Step time and memory of each host with its own KL and with the spec of the "
        "same gradient, in turns.", "make bench-overhead", "On a CPU and a small model, where fixed costs have a "
        "larger share than on a GPU.", "overhead.json", overhead_tables,
    ),
    Section(
        "collectives", "Communication", "How many collectives a step has, and how large, with and without the plugin, "
        "by the number of processes.", "make bench-collectives", "Counted and not timed, because no cluster was used.",
        "collectives.json",
    ),
    Section(
        "variance", "Bias and variance by enumeration", "How noisy and how biased a single sequence's KL gradient is, "
        "without sampling noise, on tabular policies.", "make bench-variance", "Tabular policies over a vocabulary of "
        "three.", "variance.json",
    ),
    Section(
        "staleness", "Unbiased is not the same as stable", "The reason why an importance-weighted KL can run away on "
        "stale data, and what prevents it: the pull on a suppressed token, and the number of runs that end further "
        "from the reference than without a KL term.", "make bench-staleness", "One state and a table of logits. The "
        "numbers show that the effect exists and why, not how large it is in a language model.", "staleness.json",
        staleness_tables,
    ),
    Section(
        "top_k", "The default k of exact@loss/top", "How noisy the gradient is over the drawn token in the states of "
        "a trained language model, relative to k2@loss, and how many bytes per token each k costs.",
        "make bench-top-k", "The logit gradient of single states. The interval covers the sequences that were drawn, "
        "and not other prompts, training runs or models.", "top_k.json",
    ),
    Section(
        "kernel", "The exact KL", "Time and memory of the full-vocabulary KL against the hosts' and others' kernels.",
        "make bench-kernel", "The numbers hold for the device that is named with them.",
    ),
    Section(
        "host_terms", "The sampled terms", "Time of a sampled KL term, forward and backward, against the expression "
        "that each host writes itself.", "make bench-host-terms", "Microseconds, while a step takes seconds.",
    ),
)  # fmt: skip


@dataclass
class Found:
    """A section with the results in its folder.

    Attributes:
        section: the section.
        tables: the tables of all files.
        figures: the images in the folder.
        verdicts: the verdicts that the files contain.
        commands: the commands that made the files.
        machines: the machines on which they were made.
        broken: the files that could not be read, with the reasons.
        files: number of files that were read.
    """

    section: Section
    tables: list[Table] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    files: int = 0

    @property
    def measured(self) -> bool:
        """Whether the folder has at least one readable file."""
        return self.files > 0


def find(root: Path) -> list[Found]:
    """Read all sections with their results under a folder; missing or unreadable files are listed without an error."""
    return [_read(section, root / section.name) for section in SECTIONS]


def _read(section: Section, folder: Path) -> Found:
    found = Found(section)
    for path in sorted(folder.glob(section.files)):
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict):
                raise ValueError("not a JSON object")
            tables = section.tables(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found.broken.append(f"{path.name}: {type(error).__name__}: {error}")
            continue
        found.files += 1
        found.tables += tables
        found.verdicts += [str(data["verdict"])] if data.get("verdict") else []
        found.commands += [str(data["command"])] if data.get("command") else []
        found.machines += list(_machine(data))
    if found.measured:
        found.figures = sorted(
            p for p in folder.glob("*.*") if p.suffix in (".png", ".svg") and ".partial" not in p.name
        )
    return found


def _machine(data: dict[str, Any]) -> Iterator[str]:
    if isinstance(data.get("machine"), dict):
        known = flat(data["machine"])
        yield ", ".join(f"{name} {value}" for name, value in known.items() if value not in (None, ""))
