"""Splits a file into parts for transfers with a size limit, and joins them; `python -m benchmarks.llm.parts`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

MEBIBYTE = 2**20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


class PartsError(RuntimeError):
    """The parts are incomplete, or do not give the original file."""


def split(file: Path, folder: Path, most: int) -> list[Path]:
    """Split a file into parts of nearly equal size, each with a list of all parts beside it.

    Args:
        file: the file to split.
        folder: gets one folder for each part (`1/`, `2/`, ...), so that each part can be sent alone.
        most: largest number of bytes of a part.

    Returns:
        The folders of the parts.
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
    """Join the parts below a folder; if the joined file already exists and is correct, it is not written again.

    Args:
        folder: folder with the parts at any depth.
        target: folder for the joined file.

    Returns:
        The path of the joined file.

    Raises:
        PartsError: A part is missing, or the checksum of the joined file is wrong.
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
    file: Annotated[Path, typer.Argument(help="The file to split.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the folders 1, 2, ...")],
    mebibytes: Annotated[float, typer.Option(help="Largest size of a part in MiB.")] = 48.0,
) -> None:
    """Split a file into parts."""
    for part in split(file, folder, int(mebibytes * MEBIBYTE)):
        size = sum(f.stat().st_size for f in part.iterdir()) / MEBIBYTE
        typer.echo(f"{part}: {size:.1f} MiB")


@app.command("join")
def join_command(
    folder: Annotated[Path, typer.Argument(help="Folder with the parts.")],
    target: Annotated[Path, typer.Argument(help="Folder for the joined file.")],
) -> None:
    """Join the parts and check the joined file."""
    try:
        typer.echo(str(join(folder, target)))
    except PartsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
