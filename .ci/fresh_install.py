"""Install a host and kl-plugins into a fresh environment, as docs/installation.md says, and run the host's examples.

``python .ci/fresh_install.py HOST`` makes the environment, a copy of the sources and a copy of the tests in a temporary
folder. Only torch and the host are pinned; everything else is what the host's own requirements bring. OpenRLHF's
requirements cannot be met without a GPU, so its environment is the one that its tests are pinned to.
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
    """How a host gets into an environment."""

    pins: Path
    extra: str  # the extra of kl-plugins that installs the host on a fresh machine; empty where there is none
    host: tuple[tuple[str, ...], ...]  # arguments of pip, one call each
    tools: tuple[str, ...] = ()  # what the tests of the examples need beside the host
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
    """A virtual environment in `folder`, and pip in it under the pins of torch and the host."""

    def __init__(self, folder: Path, name: str):
        self.name, self.fresh = name, HOSTS[name]
        self.python = folder / "environment" / "bin" / "python"
        venv.create(folder / "environment", symlinks=True, with_pip=True)
        self.pins = folder / "pins.txt"
        wanted = ("torch==", f"{name}==")
        lines = [*self.fresh.pins.read_text().splitlines(), *(ROOT / "constraints.txt").read_text().splitlines()]
        self.pins.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines) if line.startswith(wanted)))

    def install(self, what: str, *arguments: str) -> None:
        """Run ``pip install``, and say how long it took."""
        start = time.monotonic()
        command = (self.python, "-m", "pip", "install", "--quiet", "-c", self.pins, *arguments)
        subprocess.run(command, check=True, env=os.environ | dict(self.fresh.build_env))
        print(f"{self.name}: installed {what} in {time.monotonic() - start:.0f} s", flush=True)

    def installed(self) -> dict[str, str]:
        """The installed version of each distribution."""
        listed = subprocess.check_output((self.python, "-m", "pip", "list", "--format", "json"), text=True)
        return {entry["name"]: entry["version"] for entry in json.loads(listed)}

    def check_by_doctor(self) -> None:
        """Ask ``kl-plugins doctor``, away from the repository, whether all is well.

        Raises:
            RuntimeError: it finds a fault, or does not find the host.
        """
        command = (self.python.with_name("kl-plugins"), "doctor", "--json")
        answer = subprocess.run(command, cwd=self.pins.parent, stdout=subprocess.PIPE, text=True)
        said = json.loads(answer.stdout)
        bad = [found for found in said["hosts"] if found["level"] != "ok" and found["subject"].startswith(self.name)]
        if bad or answer.returncode or said["warnings"]:
            raise RuntimeError(f"kl-plugins doctor: {json.dumps(said, indent=1)}")


def check_nothing_changed(before: dict[str, str], after: dict[str, str]) -> None:
    """Check that installing kl-plugins into the host's environment left the host's packages alone.

    Raises:
        RuntimeError: it changed one, or brought more than its own small requirements.
    """
    changed = {name: (old, after.get(name)) for name, old in before.items() if after.get(name) != old}
    added = set(after) - set(before) - BROUGHT
    if changed or added:
        raise RuntimeError(f"installing kl-plugins changed {changed} and added {sorted(added)}")


def main(name: str) -> int:
    """Install host `name` and kl-plugins, and run the host's examples; returns the exit status of these."""
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
        # veRL brings pytest-asyncio, which warns without settings of its own; warnings are errors in the tests.
        tests = ("-m", "pytest", "--full", "-p", "no:asyncio", f"tests/{name}/test_examples.py")
        tree = copy(NEEDED, work / "tree")
        return subprocess.run((environment.python, *tests), cwd=tree, env=os.environ | ENV).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
