"""Measures which lines and branches of the three source folders the tests reach, in all processes of all targets.

::

    python .ci/branch_coverage.py run TARGET ARGS...    # run `python ARGS...` and add its data to those of the target
    python .ci/branch_coverage.py report                # combine the data of all targets and print the result

``run`` measures every Python process that is started below the given one with the same interpreter: processes of
pytest-xdist, programs that tests start, processes of torch.distributed, and Ray workers. coverage.py starts in each of
them because of environment variables. A ``.pth`` file, which is in the environment only during the run, lets each of
them also execute ``save_coverage.py``. ``report`` keeps the data, so targets can be measured one after another.

``--root`` names another checkout of the repository whose sources are measured. Its tests must import these sources.
"""

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "pyproject.toml"
SOURCES = ("kl_plugins", "adapters", "patches")
DATA = "data"
"""Name of the data files; coverage.py appends the host, the process and a random part."""


class Count(NamedTuple):
    """How many lines and branches there are, and how many the tests reach.

    Attributes:
        lines: number of lines with a statement.
        lines_reached: those that ran.
        branches: number of jumps from a line that can continue at several places.
        branches_reached: those that were taken.
    """

    lines: int
    lines_reached: int
    branches: int
    branches_reached: int

    def share(self) -> float:
        """Return the share of branches that were taken, or of lines that ran if there are no branches."""
        return self.branches_reached / self.branches if self.branches else self.lines_reached / self.lines

    def row(self, name: str) -> str:
        """Return one row of the table."""
        branches = f"{100 * self.branches_reached / self.branches:.1f}%" if self.branches else "-"
        lines = f"{100 * self.lines_reached / self.lines:.1f}%" if self.lines else "-"
        counts = f"{self.branches_reached}/{self.branches}", f"{self.lines_reached}/{self.lines}"
        return f"{branches:>8} {counts[0]:>11} {lines:>8} {counts[1]:>11}  {name}"


HEAD = f"{'branches':>8} {'':>11} {'lines':>8} {'':>11}  file"


def environment(root: Path, data: Path) -> dict[str, str]:
    """Return the environment variables under which coverage.py measures the sources of `root` and writes `data`."""
    return {"COVERAGE_PROCESS_START": str(CONFIG), "COVERAGE_ROOT": str(root), "COVERAGE_FILE": str(data)}


def run(root: Path, target: str, arguments: list[str]) -> int:
    """Run ``python`` with the arguments, measure it and all processes below it, and return its exit status."""
    folder = root / "out" / "coverage" / target
    folder.mkdir(parents=True, exist_ok=True)
    program = str(HERE / "save_coverage.py")
    # Names are sorted, so this file is read after the one of coverage.py, which starts the measurement.
    start = Path(sysconfig.get_path("purelib"), f"save_coverage_{os.getpid()}.pth")
    source = f"__import__('pathlib').Path({program!r}).read_text(encoding='utf-8')"
    execute = f"exec(compile({source}, {program!r}, 'exec'), {{'__name__': 'save_coverage'}})"
    start.write_text(f"import os; os.environ.get('COVERAGE_PROCESS_START') and {execute}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        variables = {**os.environ, **environment(root, folder / DATA)}
        with subprocess.Popen([sys.executable, *arguments], cwd=root, env=variables) as process:
            try:
                return process.wait()
            finally:
                process.terminate()
    finally:
        start.unlink()


def usable(path: Path) -> bool:
    """Return whether a data file is complete; the file of a process that was killed during writing can be damaged."""
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as data:
            tables = data.execute("select name from sqlite_master where name in ('coverage_schema', 'arc')").fetchall()
            return len(tables) == 2 and data.execute("pragma quick_check").fetchall() == [("ok",)]
    except sqlite3.Error:
        return False


def combine(root: Path) -> dict[str, Any]:
    """Combine the data of all targets, and return the report of coverage.py by file."""
    from coverage import Coverage

    folder = root / "out" / "coverage"
    written = sorted(path for path in folder.glob(f"*/{DATA}.*") if not path.name.endswith("-journal"))
    found = [path for path in written if usable(path)]
    if not found:
        sys.exit(f"{folder} holds no data; measure a target first")
    os.environ.update(environment(root, folder / DATA))
    os.chdir(root)  # coverage.py names files relative to the current folder
    measured = Coverage(config_file=str(CONFIG))
    measured.erase()
    measured.combine([str(path) for path in found], strict=True, keep=True)
    measured.save()
    report = folder / "report.json"
    measured.json_report(outfile=str(report))
    for target, paths in groupby(found, key=lambda path: path.parent.name):
        print(f"{target}: data of {len(list(paths))} processes")
    if len(found) < len(written):
        print(f"{len(written) - len(found)} processes were killed while they wrote; their data cannot be read")
    print()
    files: dict[str, Any] = json.loads(report.read_text())["files"]
    return files


def count(files: Iterable[Any]) -> Count:
    """Add up the counts of some files."""
    sums = [file["summary"] for file in files]
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return Count(*(sum(each[name] for each in sums) for name in names))


def spans(never: set[int], executed: list[int]) -> Iterator[str]:
    """Write the lines that never ran, with a dash between the first and the last where no line between them ran."""
    ordered = sorted([*((line, False) for line in never), *((line, True) for line in executed)])
    for ran, group in groupby(ordered, key=lambda line: line[1]):
        lines = [line for line, _ in group]
        if not ran:
            yield str(lines[0]) if len(lines) == 1 else f"{lines[0]}-{lines[-1]}"


def unreached(file: Any) -> str:
    """Name the lines that never ran, and the branches that lines which did run never took."""
    never = set(file["missing_lines"])
    branches = [
        f"{line}->{target if target > 0 else 'exit'}" for line, target in file["missing_branches"] if line not in never
    ]
    return ", ".join([*spans(never, file["executed_lines"]), *branches])


def report(root: Path) -> None:
    """Print branch coverage by file with the lowest first, its sums, and everything that no target reaches."""
    files = {name: file for name, file in combine(root).items() if file["summary"]["num_statements"]}
    counts = {name: count([file]) for name, file in files.items()}
    print(HEAD)
    for name in sorted(files, key=lambda name: (counts[name].share(), name)):
        print(counts[name].row(name))
    print()
    for folder in SOURCES:
        print(count(file for name, file in files.items() if name.startswith(f"{folder}/")).row(f"{folder}/"))
    print(count(files.values()).row("all"))
    print("\nNo target reaches these lines and branches (from line -> to line):")
    for name, file in sorted(files.items()):
        if missing := unreached(file):
            print(f"  {name}: {missing}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE.parent, help="checkout of the repository that is measured")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run tests of a target with coverage")
    running.add_argument("target", help="name of the target, for example verl")
    running.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of python")
    commands.add_parser("report", help="combine the data of all targets and print the coverage")
    options = parser.parse_args()
    if options.command == "run":
        return run(options.root.resolve(), options.target, options.arguments)
    report(options.root.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
