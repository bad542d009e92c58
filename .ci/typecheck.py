"""Run mypy over the three source folders as one package, because they are installed as one package.

An editable install maps ``adapters/`` and ``patches/`` into ``kl_plugins`` by an import hook, which static checkers do
not follow. This program therefore makes a folder of links with the installed layout and runs mypy there. It then puts
the names of the real files into the messages of mypy.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typecheck"


def link_tree(package: Path) -> None:
    """Make `package` a folder of links with the layout of the installed ``kl_plugins``."""
    package.mkdir(parents=True, exist_ok=True)
    wanted = {
        entry.name: entry for entry in (ROOT / "kl_plugins").iterdir() if not entry.name.startswith(("__py", "."))
    }
    wanted |= {name: ROOT / name for name in ("adapters", "patches")}
    for link in package.iterdir():
        if link.name not in wanted or not link.exists():
            link.unlink()
    for name, entry in wanted.items():
        link = package / name
        if not link.is_symlink():
            link.symlink_to(entry)


def main() -> int:
    """Run mypy with the arguments of the program, and return its exit status."""
    link_tree(TREE / "kl_plugins")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), *sys.argv[1:]]
    result = subprocess.run(command, cwd=TREE, text=True, stdout=subprocess.PIPE)
    print(result.stdout.replace("kl_plugins/adapters/", "adapters/").replace("kl_plugins/patches/", "patches/"), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
