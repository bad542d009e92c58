"""Runs TRL's own tests of GRPO and RLOO with kl-plugins attached: tests that pass without it must pass with it.

    python -m tests.downstream.trl --tests PATH/TO/trl/tests [-- -k sync_ref_model]

The tests come from a checkout of TRL at the tag of the installed version. Models and data are generated. The tests run
first under stock TRL, then with kl-plugins attached but unused, and then once for each set of specs. In the last runs,
every test whose beta is not 0 trains under a spec; ``--beta`` sets beta for the GRPO tests that leave it at 0. The exit
status is 1 if a test that passed under stock TRL does not pass any more, or if a run tested nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.downstream import hub

HERE = Path(__file__).parent
FILES = ("test_grpo_trainer.py", "test_rloo_trainer.py")
SPECS = (
    {"GRPO": "k2@loss/is:token", "RLOO": "k1@reward"},
    {"GRPO": "k1@reward", "RLOO": "k1@advantage"},
    {"GRPO": "k1@advantage", "RLOO": "k1@advantage/horizon:token"},
)


@dataclass(frozen=True)
class Outcome:
    """The result of one test.

    Attributes:
        result: ``passed``, ``failed`` or ``skipped``.
        beta: the beta of the test's config if it was not 0, otherwise empty.
        spec: the spec under which the test trained; empty if there was none.
        message: first line of the failure, at most 300 characters.
    """

    result: str
    beta: str = ""
    spec: str = ""
    message: str = ""


def run(tests: Path, work: Path, name: str, settings: dict[str, object], options: list[str]) -> dict[str, Outcome]:
    """Run the test suite once in a separate process.

    Args:
        tests: TRL's folder of tests.
        work: folder of the stand-ins, which also gets the log and the report.
        name: name of the run.
        settings: the value of ``KL_DOWNSTREAM``; see ``plugins/kl_downstream.py``.
        options: further options of pytest.

    Returns:
        The outcomes by name of the test.

    Raises:
        SystemExit: pytest wrote no report.
    """
    report = work / f"{name}.xml"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "plugins"), os.environ.get("PYTHONPATH")])),
        "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "KL_DOWNSTREAM": json.dumps(settings),
    }  # fmt: skip
    files = [str(tests / file) for file in FILES if (tests / file).exists()]
    arguments = ["-p", "kl_downstream", "-p", "no:cacheprovider", "-q", f"--junitxml={report}", *files, *options]
    with (work / f"{name}.log").open("w") as log:
        # In the folder of the stand-ins, names of the hub are relative paths.
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=work, env=environment, stdout=log, stderr=log, check=False
        )
    if not report.exists():
        raise SystemExit(f"pytest wrote no report for {name}; see {work / f'{name}.log'}")
    return dict(map(outcome, ElementTree.parse(report).iter("testcase")))


def outcome(case: ElementTree.Element) -> tuple[str, Outcome]:
    """Read the name and the outcome of a test from one ``testcase`` of a JUnit report."""
    bad = case.find("failure") if case.find("failure") is not None else case.find("error")
    result = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
    notes = {note.get("name"): note.get("value", "") for note in case.iter("property")}
    message = "" if bad is None else (bad.get("message") or "").partition("\n")[0][:300]
    scope = (case.get("classname") or "").rpartition(".")[2]
    return f"{scope}::{case.get('name')}", Outcome(result, notes.get("beta", ""), notes.get("kl", ""), message)


def compare(stock: dict[str, Outcome], attached: dict[str, Outcome]) -> dict[str, str]:
    """Return the tests that passed under stock TRL and do not pass any more, with their messages."""
    gone = Outcome("missing")
    return {
        test: f"{found.result}: {found.message}".rstrip(": ")
        for test, before in stock.items()
        if before.result == "passed" and (found := attached.get(test, gone)).result != "passed"
    }


def counts(outcomes: dict[str, Outcome]) -> dict[str, int]:
    """Count the tests by result, and those that trained under a spec."""
    results = [found.result for found in outcomes.values()]
    numbers = {result: results.count(result) for result in ("passed", "failed", "skipped")}
    return numbers | {"under a spec": sum(bool(found.spec) for found in outcomes.values())}


def main(argv: list[str] | None = None) -> int:
    """Do all runs, print one line per run, and write ``summary.json``; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, required=True, help="the tests folder of a TRL checkout")
    parser.add_argument("--beta", type=float, default=0.0, help="beta for the GRPO tests that leave it at 0")
    parser.add_argument(
        "--vocabulary", type=int, default=hub.VOCABULARY,
        help="vocabulary size of the stand-ins; 320 is several times faster, but tests that contain token ids fail",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/downstream/trl"))
    parser.add_argument("--specs", action="append", type=json.loads, help='JSON, e.g. {"GRPO": "k2@loss"}; repeatable')
    parser.add_argument("options", nargs="*", help="options for pytest, after --")
    given = parser.parse_args(argv)
    tests, work = given.tests.resolve(), given.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    unknown = hub.build(hub.named_in(tests / file for file in FILES if (tests / file).exists()), work, given.vocabulary)
    if unknown:
        print(f"no stand-in exists for these names, so their tests fail in every run: {', '.join(unknown)}")

    settings: dict[str, object] = {"attach": False, "specs": {}, "beta": given.beta, "only": None}
    summary, problems = {}, 0

    def report(name: str, specs: dict[str, str], outcomes: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
        nonlocal problems
        numbers, regressions = counts(outcomes), compare(expected, outcomes)
        # If no test of a run could have failed, its comparison says nothing.
        empty = numbers["under a spec" if specs else "passed"] == 0
        problems += len(regressions) + empty
        summary[name] = {"specs": specs, **numbers, "regressions": regressions}
        print(f"{name:9} {', '.join(f'{n} {word}' for word, n in numbers.items())} {json.dumps(specs)}", flush=True)
        for test, message in regressions.items():
            print(f"  {test} {message}")
        if empty:
            print(f"  this run tested nothing; see {work / f'{name}.log'}")

    stock = run(tests, work, "stock", settings, given.options)
    report("stock", {}, stock, stock)
    report("attached", {}, run(tests, work, "attached", settings | {"attach": True}, given.options), stock)
    # Tests without a KL term ignore the specs, so repeating them would only repeat the attached run.
    regularised = {test: found for test, found in stock.items() if found.result == "passed" and found.beta}
    for i, specs in enumerate(given.specs or SPECS, start=1):
        changes = {"attach": True, "specs": specs, "only": list(regularised)}
        report(f"specs-{i}", specs, run(tests, work, f"specs-{i}", settings | changes, given.options), regularised)
    (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
