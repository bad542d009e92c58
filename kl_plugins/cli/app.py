"""The commands of ``kl-plugins`` and their arguments.

Each command imports its modules when it runs, so that every command starts quickly. The parser is the one of the
standard library for the same reason: importing a parser that uses pydantic takes as long as the rest of ``explain``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kl_plugins import __version__

DESCRIPTION = "KL regularisers with the right gradient, for the RLHF framework you already run."
EXPLAIN = """Say what a KL spec computes, which gradient it estimates on-policy and off-policy, which caveats it has,
and which setting of your framework takes it. A spec that needs /allow:biased is explained without that option, too.
With --host, say what a config of your framework optimises, as it is: kl-plugins explain --host trl grpo.yaml"""
LIST = "List estimators, placements, presets, corrections, options, beta schedules and hosts."
DOCTOR = """Check this installation: versions, backends, hosts and their sources, with a remedy for each problem.
The exit status is 1 if there is a fault. A host that is not installed is not a fault."""
REPORT = """Read the logs of one or more runs, say in words what they show about the KL, and write one HTML page with
plots that needs no other file. A log is a JSON-lines file with one object per step (also that of veRL's logger file),
trainer_state.json of TRL or the folder with it, or a folder of TensorBoard's event files."""
RUN = """Run a program of your framework under the plugin, for example: kl-plugins run trl grpo --config x.yaml
--kl default. With several processes: torchrun --nproc_per_node 8 -m kl_plugins run trl grpo ..."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser("kl-plugins", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kl-plugins {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, allow_abbrev=False)

    explain = add("explain", "say which gradient a KL spec estimates, and why", EXPLAIN)
    explain.add_argument("spec", metavar="SPEC", help="a KL spec or preset, for example k2@loss/is:token")
    explain.add_argument(
        "--host",
        metavar="HOST",
        help="explain a config of this framework instead: kl-plugins explain --host trl CONFIG..., where CONFIG is a "
        "file, or an argument of the program; with --suggest, --version X and --length N (tokens of a response)",
    )
    others = [add("list", "list the words of a spec, the presets and the hosts", LIST)]
    others.append(add("doctor", "check this installation, with a remedy for each problem", DOCTOR))
    others[-1].add_argument(
        "--config",
        metavar="FILE",
        help="also explain the sampling settings in this config, script or command line (- reads standard input)",
    )
    report = add("report", "make one HTML page from the logs of runs", REPORT)
    report.add_argument("runs", metavar="RUN", nargs="+", help="a log file or folder, or NAME=PATH")
    report.add_argument("--out", metavar="FILE", help="the page to write (default: report.html; with --json: none)")
    others.append(report)
    for command in (explain, *others):
        command.add_argument("--json", action="store_true", help="print one JSON document, also for an invalid spec")
    run = add("run", "run a program of a framework under the plugin", RUN)
    run.add_argument("module", metavar="HOST|MODULE", help="a host (trl), or a module of one (a.b.c)")
    run.add_argument(
        "arguments", metavar="ARGS", nargs="*", help="arguments of the program: everything that follows, also --help"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        arguments: the arguments without the name of the program; by default ``sys.argv[1:]``.

    Raises:
        SystemExit: Always, with the exit status of the command.
    """
    sys.exit(_dispatch(list(sys.argv[1:] if arguments is None else arguments)))


def _dispatch(arguments: list[str]) -> int:
    if len(arguments) > 1 and arguments[0] == "run" and not arguments[1].startswith("-"):
        # The parser must not see these words: all of them, also "--" and "--help", are arguments of the program.
        from kl_plugins.cli.running import run_command

        return run_command(arguments[1], arguments[2:])
    if arguments[:1] == ["explain"] and any(word.partition("=")[0] == "--host" for word in arguments):
        # The parser must not see these words either: flags of the framework are among them.
        from kl_plugins.cli.explaining_config import explain_config_command

        return explain_config_command(arguments[1:])
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    chosen = parser.parse_args(arguments)
    if chosen.command == "run":
        parser.error("run: the host or module comes first, then its arguments")
    if chosen.command == "explain":
        from kl_plugins.cli.explaining import explain_command

        return explain_command(chosen.spec, chosen.json)
    if chosen.command == "list":
        from kl_plugins.cli.listing import list_command

        return list_command(chosen.json)
    if chosen.command == "report":
        from kl_plugins.cli.reporting import report_command

        return report_command(chosen.runs, chosen.out, chosen.json)
    from kl_plugins.cli.doctor import doctor_command

    return doctor_command(chosen.json, chosen.config)
