"""Tests of the wheel, the sdist and an editable install: what they contain, and whether it can be imported."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from kl_plugins import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kl_plugins": "kl_plugins", "adapters": "kl_plugins/adapters", "patches": "kl_plugins/patches"}
INFO = f"kl_plugins-{__version__}.dist-info"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in a folder outside the repository and return its output; a failure shows the output."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, text=True, capture_output=True)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository, so that builds write nothing into it and edits during the tests have no effect."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, copy, ignore=ignored))


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist and a wheel from it (``from_sdist``), and a wheel from the source tree (``direct``)."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", source)
    run(*build, "--outdir", out / "from_sdist", cwd=out)
    run(*build, "--wheel", "--outdir", out / "direct", cwd=out)
    return out


def wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_three_folders_under_one_name(source: Path, built: Path) -> None:
    names = {name for name in wheel(built / "direct").namelist() if ".dist-info/" not in name}
    expected = {"kl_plugins/py.typed"}
    for folder, installed in FOLDERS.items():
        files = (path for name in ("*.py", "fingerprints.json", "page.html") for path in (source / folder).rglob(name))
        for path in files:
            expected.add(f"{installed}/{path.relative_to(source / folder).as_posix()}")
    assert names == expected


def test_wheel_has_nothing_else_at_the_top(built: Path) -> None:
    tops = {name.split("/")[0] for name in wheel(built / "direct").namelist()}
    assert tops == {"kl_plugins", INFO}


def test_sdist_builds_the_same_wheel(built: Path) -> None:
    direct, from_sdist = wheel(built / "direct"), wheel(built / "from_sdist")
    assert sorted(direct.namelist()) == sorted(from_sdist.namelist())
    for name in direct.namelist():
        if not name.endswith("/RECORD"):
            assert direct.read(name) == from_sdist.read(name), name


def test_sdist_holds_the_source_folders_and_the_licence(built: Path) -> None:
    (path,) = (built / "from_sdist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert {f"{folder}/__init__.py" for folder in FOLDERS} <= names


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    missing = {str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()}
    assert not missing, f"without __init__.py these would not be installed: {missing}"


def test_wheel_installs_and_imports(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    (path,) = (built / "direct").glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, path, cwd=tmp_path)
    assert {entry.name for entry in target.iterdir()} == {"bin", "kl_plugins", INFO}
    located = run(sys.executable, "-c", _locate(target), cwd=tmp_path).split()
    assert located == [str(target / installed / "__init__.py") for installed in FOLDERS.values()]


def test_editable_install_follows_the_tree(source: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(source, tmp_path / "repository"))
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # setuptools and the dependencies come from the environment of the tests. The editable install of that environment
    # stays inactive, because Python does not process .pth files in a folder that another .pth file adds.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", tree, cwd=tmp_path)

    added = {path.name for path in site.iterdir()} - {"outer.pth", "__pycache__"}
    assert all(name.startswith(("__editable__", INFO)) for name in added), added
    located = run(python, "-c", _locate(), cwd=tmp_path).split()
    assert located == [str(tree / folder / "__init__.py") for folder in FOLDERS]

    (tree / "adapters" / "newhost").mkdir()
    (tree / "adapters" / "newhost" / "__init__.py").write_text("ANSWER = 42\n")
    see_new = "import kl_plugins.adapters.newhost as host; print(host.ANSWER)"
    assert run(python, "-c", see_new, cwd=tmp_path).strip() == "42"
    leaked = "from importlib.util import find_spec; print(*filter(find_spec, ('adapters', 'patches', 'benchmarks')))"
    assert run(python, "-c", leaked, cwd=tmp_path).strip() == ""


def _locate(first: Path | None = None) -> str:
    """Return a program that prints the files from which the three packages were imported."""
    path = f"import sys; sys.path.insert(0, {str(first)!r}); " if first else ""
    return path + (
        "import kl_plugins, kl_plugins.adapters as adapters, kl_plugins.patches as patches; "
        "print(kl_plugins.__file__, adapters.__file__, patches.__file__)"
    )
