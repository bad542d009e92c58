"""Lists the functions of kl-plugins that carry a KL spec from the host's flag to the gradient, by watching a real run.

A function is on the path if it is on the call stack while the text of the spec is parsed or the loss term is computed.
Functions of the host are not counted. A function also is on the path if it passes the spec on, that is, if it returns
or builds an object that holds the spec, such as a session or a micro-batch. Checks, receipts and metrics, which only
read the spec, are not on the path.

:func:`start` and :func:`stop` are sent to worker processes by value, so they contain everything that they need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

LIMIT = 16
"""The largest number of functions that a spec may pass in one host."""

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
"""The guide that lists the functions of each host under "Follow one spec", for people to read along."""


def start(process: object = None) -> None:
    """Begin to watch the calls of this thread.

    Args:
        process: not used; workers that run this function pass themselves.
    """
    import sys

    seen: list[str] = []

    def name_of(frame):  # type: ignore[no-untyped-def]
        module = frame.f_globals.get("__name__", "")
        code = frame.f_code
        if not module.startswith("kl_plugins.") or code.co_filename.startswith("<"):
            return None
        if code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>", "<lambda>", "<module>"):
            return None
        return f"{module.removeprefix('kl_plugins.')}:{getattr(code, 'co_qualname', code.co_name)}"

    def on_stack(frame):  # type: ignore[no-untyped-def]
        found = []
        while frame is not None:
            found.append(name_of(frame))
            frame = frame.f_back
        return reversed([name for name in found if name is not None])

    def holds(value, depth):  # type: ignore[no-untyped-def]
        kind = type(value)
        if kind.__name__ == "KLSpec" and kind.__module__.startswith("kl_plugins."):
            return True
        if depth == 0:
            return False
        if isinstance(value, tuple) and len(value) < 10:
            return any(holds(part, depth - 1) for part in value)
        if kind.__module__.startswith("kl_plugins."):
            parts = list(getattr(value, "__dict__", {}).values())
            return any(holds(part, depth - 1) for part in parts)
        return False

    def note(names):  # type: ignore[no-untyped-def]
        seen.extend(name for name in names if name not in seen)

    def watch(frame, event, value):  # type: ignore[no-untyped-def]
        if event == "call":
            code, module = frame.f_code, frame.f_globals.get("__name__", "")
            parsing = module == "kl_plugins.spec" and code.co_name == "parse"
            if parsing or (module == "kl_plugins.term" and code.co_name == "kl_term"):
                note(on_stack(frame))
        elif event == "return":
            name = name_of(frame)
            if name is None or name.startswith(("spec", "term", "explain", "cli")):
                return
            made = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else value
            if holds(made, 2):
                note([name])

    sys._kl_plugins_path = seen  # type: ignore[attr-defined]
    sys.setprofile(watch)


def stop(process: object = None) -> list[str]:
    """Stop watching and return the names of the functions on the path, in the order in which they were found.

    Args:
        process: not used; workers that run this function pass themselves.
    """
    import sys

    sys.setprofile(None)
    found: list[str] = sys.__dict__.pop("_kl_plugins_path")
    return found


def in_guide(host: str) -> list[str]:
    """Return the functions that the guide lists for a host, as ``module:function``, in its order.

    Args:
        host: the host's name as the guide's headings spell it.
    """
    text = GUIDE.read_text(encoding="utf-8").partition("## Follow one spec")[2].partition("\n## ")[0]
    part = text.partition(f"### {host}\n")[2].partition("\n### ")[0]
    items = re.findall(r"^\d+\. `(\S+)\.py`, `(\S+?)`", part, re.MULTILINE)
    found = []
    for file, function in items:
        module = file.removeprefix("kl_plugins/").removesuffix("/__init__").replace("/", ".")
        found.append(f"{module}:{function}")
    return found


def listed(*parts: Iterable[str]) -> list[str]:
    """Join the functions of several processes, each name once; all hook objects of the engine count as one function."""
    names = [name for part in parts for name in part]
    names = ["patches.engine.patch:Hook" if ":Hook." in name else name for name in names]
    return list(dict.fromkeys(name.replace(".<locals>", "") for name in names))
