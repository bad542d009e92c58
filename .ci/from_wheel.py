"""Run the tests of the core against the built wheel, in an environment that does not see the source folders.

An editable install finds every file of the repository, so tests with it cannot show that a file is missing in the
wheel. This program installs the wheel into a separate virtual environment, which uses the dependencies of the
environment that runs the program. The tests run in a copy of the folders that they need. ``kl_plugins/``, ``adapters/``
and ``patches/`` are not in that copy.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kl_plugins", "adapters", "patches", "pyproject.toml", "setup.py", "README.md", "LICENSE")
NEEDED = ("tests", "benchmarks", "docs", "conftest.py", "pyproject.toml", "README.md")
TESTS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "tests/core", "benchmarks/tests/core")
LOCATE = "import kl_plugins, kl_plugins.adapters, kl_plugins.patches; print(kl_plugins.__file__)"


def copy(names: tuple[str, ...], folder: Path) -> Path:
    """Copy files and folders of the repository into a new `folder`, and return that folder."""
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def make_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and with the dependencies of the present environment.

    Returns:
        The path of its interpreter.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Python ignores .pth files in a folder that another .pth file adds, so the editable install has no effect here.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    subprocess.run(command, check=True)
    return python


def main() -> int:
    """Run pytest with the arguments of the program, by default all tests of the core, and return its exit status."""
    with tempfile.TemporaryDirectory(prefix="kl-plugins-wheel-") as name:
        work = Path(name).resolve()
        # The wheel is built from a copy. A build folder in the repository could put files that are deleted into it.
        sources = copy(SOURCES, work / "sources")
        build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work / "dist", sources)
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = (work / "dist").glob("*.whl")
        python = make_environment(work / "environment", wheel)
        tree = copy(NEEDED, work / "tree")
        located = Path(subprocess.check_output([python, "-c", LOCATE], cwd=tree, text=True).strip())
        if not located.is_relative_to(work / "environment"):
            print(f"kl_plugins was imported from {located}, not from the wheel", file=sys.stderr)
            return 1
        print(f"testing {wheel.name}", flush=True)
        return subprocess.run([python, "-m", "pytest", *(sys.argv[1:] or TESTS)], cwd=tree).returncode


if __name__ == "__main__":
    sys.exit(main())
