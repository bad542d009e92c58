"""TRL's own test-suite for GRPO and RLOO under kl-plugins: what passes with stock TRL has to pass with it attached.

    python -m tests.downstream.trl --tests PATH/TO/trl/tests [-- -k sync_ref_model]

The tests come from a checkout of TRL, at the tag of the TRL that is installed; models and data are made on the spot.
They run under stock TRL, with kl-plugins attached and unused, and once for each set of specs, which every test whose
beta is not 0 then trains under; ``--beta`` gives one to the GRPO tests that leave it 0. Exit code 1 where a test that
passed stops passing, or where nothing was tested.
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
    """What became of one test: passed, failed or skipped; whether its beta was not 0, and the spec it trained under."""

    result: str
    beta: str = ""
    spec: str = ""
    message: str = ""


def run(tests: Path, work: Path, name: str, settings: dict[str, object], options: list[str]) -> dict[str, Outcome]:
    """Run the suite once, in a process of its own."""
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
        # In the folder of the stand-ins, where the hub's names are paths.
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=work, env=environment, stdout=log, stderr=log, check=False
        )
    if not report.exists():
        raise SystemExit(f"pytest wrote no report for {name}; see {work / f'{name}.log'}")
    return dict(map(outcome, ElementTree.parse(report).iter("testcase")))


def outcome(case: ElementTree.Element) -> tuple[str, Outcome]:
    """One ``testcase`` of a JUnit report."""
    bad = case.find("failure") if case.find("failure") is not None else case.find("error")
    result = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
    notes = {note.get("name"): note.get("value", "") for note in case.iter("property")}
    message = "" if bad is None else (bad.get("message") or "").partition("\n")[0][:300]
    scope = (case.get("classname") or "").rpartition(".")[2]
    return f"{scope}::{case.get('name')}", Outcome(result, notes.get("beta", ""), notes.get("kl", ""), message)


def compare(stock: dict[str, Outcome], attached: dict[str, Outcome]) -> dict[str, str]:
    """Tests that passed under stock TRL and do not any more, with what they say."""
    gone = Outcome("missing")
    return {
        test: f"{found.result}: {found.message}".rstrip(": ")
        for test, before in stock.items()
        if before.result == "passed" and (found := attached.get(test, gone)).result != "passed"
    }


def counts(outcomes: dict[str, Outcome]) -> dict[str, int]:
    """Number of tests by result, and of those that trained under a spec."""
    results = [found.result for found in outcomes.values()]
    numbers = {result: results.count(result) for result in ("passed", "failed", "skipped")}
    return numbers | {"under a spec": sum(bool(found.spec) for found in outcomes.values())}


def main(argv: list[str] | None = None) -> int:
    """Run everything, write ``summary.json``, print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, required=True, help="the tests folder of a TRL checkout")
    parser.add_argument("--beta", type=float, default=0.0, help="for GRPO tests that leave beta 0")
    parser.add_argument(
        "--vocabulary", type=int, default=hub.VOCABULARY,
        help="of the stand-ins; 320 is several times faster, but not for tests that write out token numbers",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/downstream/trl"))
    parser.add_argument("--specs", action="append", type=json.loads, help='JSON, e.g. {"GRPO": "k2@loss"}; repeatable')
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    given = parser.parse_args(argv)
    tests, work = given.tests.resolve(), given.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    unknown = hub.build(hub.named_in(tests / file for file in FILES if (tests / file).exists()), work, given.vocabulary)
    if unknown:
        print(f"no stand-in, so these tests fail everywhere: {', '.join(unknown)}")

    settings: dict[str, object] = {"attach": False, "specs": {}, "beta": given.beta, "only": None}
    summary, problems = {}, 0

    def report(name: str, specs: dict[str, str], outcomes: dict[str, Outcome], expected: dict[str, Outcome]) -> None:
        nonlocal problems
        numbers, regressions = counts(outcomes), compare(expected, outcomes)
        # A comparison in which nothing could have failed shows nothing.
        empty = numbers["under a spec" if specs else "passed"] == 0
        problems += len(regressions) + empty
        summary[name] = {"specs": specs, **numbers, "regressions": regressions}
        print(f"{name:9} {', '.join(f'{n} {word}' for word, n in numbers.items())} {json.dumps(specs)}", flush=True)
        for test, message in regressions.items():
            print(f"  {test} {message}")
        if empty:
            print(f"  nothing tested, see {work / f'{name}.log'}")

    stock = run(tests, work, "stock", settings, given.options)
    report("stock", {}, stock, stock)
    report("attached", {}, run(tests, work, "attached", settings | {"attach": True}, given.options), stock)
    # The rest would only be the attached run once more.
    regularised = {test: found for test, found in stock.items() if found.result == "passed" and found.beta}
    for i, specs in enumerate(given.specs or SPECS, start=1):
        changes = {"attach": True, "specs": specs, "only": list(regularised)}
        report(f"specs-{i}", specs, run(tests, work, f"specs-{i}", settings | changes, given.options), regularised)
    (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
