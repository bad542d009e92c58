"""Compares a version of a host with the sources that were checked, and adds the fingerprints of new code.

Usage::

    python .ci/fingerprints.py HOST FOLDER VERSION [--add]

``FOLDER`` is the host's package folder in an unpacked wheel; its files are read and not imported. Read what changed
before you add it: a fingerprint says that the hooks were checked with this code.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from kl_plugins.patches.engine.fingerprint import fingerprints_in_folder


def main() -> None:
    """Print the functions whose code is not known, or that are gone; with ``--add``, write the new fingerprints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", choices=("trl", "verl", "openrlhf"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("version")
    parser.add_argument("--add", action="store_true", help="write new fingerprints into the table")
    given = parser.parse_args()
    sources = importlib.import_module(f"kl_plugins.adapters.{given.host}").ADAPTER.hooks.sources
    table = sources.checked
    for name, digest in fingerprints_in_folder(given.folder, table).items():
        if digest is None:
            print(f"{name}: not there")
        elif digest not in table[name].values():
            print(f"{name}: new code, {digest}")
            table[name][given.version] = digest
    if given.add:
        path = Path("patches") / given.host / "fingerprints.json"
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
