"""Prints which packages are missing that the stages need and that are not among the wheels of the bundle."""

import sys
from importlib.util import find_spec

NEEDED = (
    "torch", "transformers", "accelerate", "peft", "tokenizers", "numpy", "pandas", "pyarrow", "fsspec", "xxhash",
    "wrapt", "packaging", "rich", "typer", "jinja2", "matplotlib", "tqdm", "yaml",
    "pytest", "pytest_timeout", "hypothesis",
)  # fmt: skip


def main() -> int:
    """Print the missing packages and return the exit status: 1 if a package is missing, otherwise 0.

    The check runs first, so that no time of the machine is spent on an installation that cannot succeed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"{sys.executable} lacks {', '.join(missing)}: add wheels of them to wheels/", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
