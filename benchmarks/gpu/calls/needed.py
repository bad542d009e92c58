"""Names the packages that the stages need, that no wheel of the bundle brings, and that are not here."""

import sys
from importlib.util import find_spec

NEEDED = (
    "torch", "transformers", "accelerate", "peft", "tokenizers", "numpy", "pandas", "pyarrow", "fsspec", "xxhash",
    "wrapt", "packaging", "rich", "typer", "jinja2", "matplotlib", "tqdm", "yaml",
    "pytest", "pytest_timeout", "hypothesis",
)  # fmt: skip


def main() -> int:
    """Print what is missing, before any time of a machine is spent on half an installation; 1 where anything is."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"{sys.executable} lacks {', '.join(missing)}: add wheels of them to wheels/", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
