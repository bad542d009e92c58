"""A file in parts, for links that carry less than it holds: `python -m benchmarks.llm.parts split|join`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

MEBIBYTE = 2**20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


class PartsError(RuntimeError):
    """Parts that do not make the file they were cut from."""


def split(file: Path, folder: Path, most: int) -> list[Path]:
    """Cut a file into parts of nearly equal size, each with a list of all of them beside it.

    Args:
        file: what is cut.
        folder: gets a folder for each part, so that each can travel alone: `1/`, `2/`, ...
        most: bytes of a part.

    Returns:
        The folders.
    """
    size = file.stat().st_size
    count = max(1, -(-size // most))
    each = -(-size // count)
    digest, made = _digest(file), []
    with file.open("rb") as source:
        for number in range(1, count + 1):
            part = folder / str(number)
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{file.name}.part{number}").write_bytes(source.read(each))
            about = {"name": file.name, "bytes": size, "sha256": digest, "parts": count}
            (part / f"{file.name}.json").write_text(json.dumps(about) + "\n")
            made.append(part)
    return made


def join(folder: Path, target: Path) -> Path:
    """Put the parts below a folder together again; a file that is there already and right is left alone.

    Args:
        folder: holds the parts, at any depth.
        target: folder of the joined file.

    Raises:
        PartsError: a part is missing, or the whole has another checksum.
    """
    lists = sorted(folder.rglob("*.json"))
    if not lists:
        raise PartsError(f"no parts below {folder}")
    about = json.loads(lists[0].read_text())
    name, joined = about["name"], target / about["name"]
    if joined.exists() and _digest(joined) == about["sha256"]:
        return joined
    found = {int(p.name.rpartition(".part")[2]): p for p in folder.rglob(f"{name}.part*")}
    missing = [n for n in range(1, about["parts"] + 1) if n not in found]
    if missing:
        raise PartsError(f"of {about['parts']} parts of {name}, {', '.join(map(str, missing))} are not below {folder}")
    target.mkdir(parents=True, exist_ok=True)
    partial = joined.with_suffix(joined.suffix + ".partial")
    with partial.open("wb") as out:
        for number in range(1, about["parts"] + 1):
            out.write(found[number].read_bytes())
    if _digest(partial) != about["sha256"]:
        partial.unlink()
        raise PartsError(f"the parts of {name} below {folder} have another checksum than the file they were cut from")
    partial.replace(joined)
    return joined


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while block := source.read(MEBIBYTE):
            digest.update(block)
    return digest.hexdigest()


@app.command("split")
def split_command(
    file: Annotated[Path, typer.Argument(help="What is cut.")],
    folder: Annotated[Path, typer.Argument(help="Gets the folders 1, 2, ...")],
    mebibytes: Annotated[float, typer.Option(help="Most of a part.")] = 48.0,
) -> None:
    """Cut a file into parts."""
    for part in split(file, folder, int(mebibytes * MEBIBYTE)):
        size = sum(f.stat().st_size for f in part.iterdir()) / MEBIBYTE
        typer.echo(f"{part}: {size:.1f} MiB")


@app.command("join")
def join_command(
    folder: Annotated[Path, typer.Argument(help="Holds the parts.")],
    target: Annotated[Path, typer.Argument(help="Folder of the joined file.")],
) -> None:
    """Put the parts together and check the whole."""
    try:
        typer.echo(str(join(folder, target)))
    except PartsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
