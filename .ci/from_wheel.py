"""Run the tests of the core against the built wheel, in an environment that does not see the source folders.

An editable install finds every file of the repository, so tests on it cannot show that the wheel lacks one. Here the
wheel is installed into a virtual environment of its own, which borrows its dependencies from the environment that runs
this program. The tests run from a copy of the folders that they need, and ``kl_plugins/``, ``adapters/`` and
``patches/`` are not among these.
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
    """Copy files and folders of the repository into a new `folder`; returns it."""
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def make_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment that holds the wheel and sees the dependencies around us; the path of its interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Python does not read the .pth files of a folder that is itself named in one, so the editable install stays unseen.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    subprocess.run(command, check=True)
    return python


def main() -> int:
    """Run pytest with the arguments given, or all tests of the core; returns its exit status."""
    with tempfile.TemporaryDirectory(prefix="kl-plugins-wheel-") as name:
        work = Path(name).resolve()
        # Built from a copy: a build folder in the repository would keep files that are gone, and put them into wheels.
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
