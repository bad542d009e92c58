"""Install a host and kl-plugins into a fresh environment, as docs/installation.md says, and run the host's examples.

The command ``python .ci/fresh_install.py HOST`` makes the environment, a copy of the sources and a copy of the tests in
a temporary folder. Only torch and the host are pinned; pip chooses all other versions by the requirements of the host.
OpenRLHF is an exception: its requirements cannot be met without a GPU, so its environment has the versions to which its
tests are pinned.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from from_wheel import NEEDED, ROOT, SOURCES, copy

PINS = ROOT / "tests" / "constraints"
ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Fresh:
    """How to install a host into an environment.

    Attributes:
        pins: constraints file with the versions of the host and of torch.
        extra: the extra of kl-plugins that installs the host on a fresh machine; empty if there is none.
        host: arguments of the calls of ``pip install`` that install the host, one tuple for each call.
        tools: packages that the tests of the examples need in addition to the host.
        build_env: environment variables of all calls of pip.
    """

    pins: Path
    extra: str
    host: tuple[tuple[str, ...], ...]
    tools: tuple[str, ...] = ()
    build_env: tuple[tuple[str, str], ...] = ()


BROUGHT = {"kl-plugins", "wrapt", "packaging", "rich", "markdown-it-py", "mdurl", "Pygments"}
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "numpy")
HOSTS = {
    "trl": Fresh(PINS / "trl-1.16.txt", "trl", (("trl",),), TOOLS),
    "verl": Fresh(PINS / "verl-0.9.txt", "verl", (("verl",),), TOOLS),
    "openrlhf": Fresh(
        PINS / "openrlhf-0.11.txt",
        "",
        (
            ("--no-deps", "-r", str(PINS / "openrlhf-0.11.txt")),
            ("--no-deps", "--no-build-isolation", "deepspeed==0.19.6"),
        ),
        build_env=(("DS_ACCELERATOR", "cpu"), ("DS_BUILD_OPS", "0")),
    ),
}


class Environment:
    """A virtual environment in `folder`, in which pip keeps to the pinned versions of torch and of the host."""

    def __init__(self, folder: Path, name: str):
        self.name, self.fresh = name, HOSTS[name]
        self.python = folder / "environment" / "bin" / "python"
        venv.create(folder / "environment", symlinks=True, with_pip=True)
        self.pins = folder / "pins.txt"
        wanted = ("torch==", f"{name}==")
        lines = [*self.fresh.pins.read_text().splitlines(), *(ROOT / "constraints.txt").read_text().splitlines()]
        self.pins.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines) if line.startswith(wanted)))

    def install(self, what: str, *arguments: str) -> None:
        """Run ``pip install`` with these arguments, and print how long it took to install `what`."""
        start = time.monotonic()
        command = (self.python, "-m", "pip", "install", "--quiet", "-c", self.pins, *arguments)
        subprocess.run(command, check=True, env=os.environ | dict(self.fresh.build_env))
        print(f"{self.name}: installed {what} in {time.monotonic() - start:.0f} s", flush=True)

    def installed(self) -> dict[str, str]:
        """Return the installed version of each distribution."""
        listed = subprocess.check_output((self.python, "-m", "pip", "list", "--format", "json"), text=True)
        return {entry["name"]: entry["version"] for entry in json.loads(listed)}

    def check_by_doctor(self) -> None:
        """Check, in a folder outside the repository, that ``kl-plugins doctor`` reports no problem.

        Raises:
            RuntimeError: It reports a fault or a warning, or it does not find the host.
        """
        command = (self.python.with_name("kl-plugins"), "doctor", "--json")
        answer = subprocess.run(command, cwd=self.pins.parent, stdout=subprocess.PIPE, text=True)
        said = json.loads(answer.stdout)
        bad = [found for found in said["hosts"] if found["level"] != "ok" and found["subject"].startswith(self.name)]
        if bad or answer.returncode or said["warnings"]:
            raise RuntimeError(f"kl-plugins doctor: {json.dumps(said, indent=1)}")


def check_nothing_changed(before: dict[str, str], after: dict[str, str]) -> None:
    """Check that installing kl-plugins into the environment of a host did not change the packages there.

    Args:
        before: versions before the installation, by distribution.
        after: versions after the installation, by distribution.

    Raises:
        RuntimeError: The installation changed a package, or it added more than the requirements of kl-plugins itself.
    """
    changed = {name: (old, after.get(name)) for name, old in before.items() if after.get(name) != old}
    added = set(after) - set(before) - BROUGHT
    if changed or added:
        raise RuntimeError(f"installing kl-plugins changed {changed} and added {sorted(added)}")


def main(name: str) -> int:
    """Install the host `name` and kl-plugins, run the host's examples, and return their exit status."""
    with tempfile.TemporaryDirectory(prefix=f"kl-plugins-{name}-") as folder:
        work = Path(folder).resolve()
        sources, environment = copy(SOURCES, work / "kl-plugins"), Environment(work, name)
        for arguments in environment.fresh.host:
            environment.install(f"the host ({' '.join(arguments)})", *arguments)
        before = environment.installed()
        environment.install("kl-plugins", str(sources))
        check_nothing_changed(before, environment.installed())
        environment.check_by_doctor()
        if environment.fresh.extra:
            environment.install("the extra", f"{sources}[{environment.fresh.extra}]")
        if environment.fresh.tools:
            environment.install("the test tools", *environment.fresh.tools)
        # veRL requires pytest-asyncio, which warns if it is not configured. The tests treat warnings as errors.
        tests = ("-m", "pytest", "--full", "-p", "no:asyncio", f"tests/{name}/test_examples.py")
        tree = copy(NEEDED, work / "tree")
        return subprocess.run((environment.python, *tests), cwd=tree, env=os.environ | ENV).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
