"""The settings that all runs of a comparison have in common, and the arms in which they differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

NONE, HOST = "none", "trl"
MEANINGS = {NONE: "no KL", HOST: "TRL's own KL, as it comes"}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Rewards are centred in their group and not divided by their standard deviation, and all tokens have the same weight,
    so that the objective is E[R] - beta KL, with the KL summed over a completion.

    Attributes:
        model: folder of the reference, from which every run starts.
        task: a name in `tasks.TASKS`.
        device: `cpu` or `cuda`; on the latter TRL computes in bf16 over float32 weights.
        steps: number of optimizer steps, each on one new rollout.
        prompts, generations: number of prompts per step, and of completions per prompt.
        tokens: largest number of tokens of a completion.
        beta: coefficient of every arm that has a KL term.
        learning_rate: learning rate of AdamW; it is constant after two steps.
        delay: number of updates that the sampler is behind; None uses TRL's own generation, without delay.
        evaluate_every: number of steps between evaluations.
        evaluation_samples: number of completions per held-out prompt.
    """

    model: str = ""
    task: str = "letter"
    device: str = "cpu"
    steps: int = 45
    prompts: int = 4
    generations: int = 4
    tokens: int = 24
    beta: float = 0.1
    learning_rate: float = 5e-5
    delay: int | None = None
    evaluate_every: int = 15
    evaluation_samples: int = 4

    @property
    def batch(self) -> int:
        """Number of completions per step."""
        return self.prompts * self.generations


def checked_arm(name: str) -> str:
    """Check the name of an arm, which is `none`, `trl`, a KL spec or a preset, and return it.

    Raises:
        KLSpecError: The name is none of these.
    """
    from kl_plugins import KLSpec

    if name not in (NONE, HOST):
        KLSpec.parse(name)
    return name


def meaning(arm: str) -> str:
    """Return the description of an arm, for tables."""
    from kl_plugins import KLSpec

    if arm in MEANINGS:
        return MEANINGS[arm]
    canonical = str(KLSpec.parse(arm))
    return arm if canonical == arm else f"{arm} ({canonical})"


def slug(text: str) -> str:
    """Return a text in a form that file names can have."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    """Return the version of every package that a result depends on."""
    return {name: version(name) for name in ("kl-plugins", "trl", "transformers", "torch", "accelerate")}


def sources(names: Iterable[str]) -> str:
    """Return a digest of the code that runs depend on: kl-plugins, files of this folder, and installed versions.

    Args:
        names: names of files in this folder.
    """
    digest = hashlib.sha256(json.dumps(versions()).encode())
    here = Path(__file__).parent
    files = [*(here / f"{name}.py" for name in names), here.parent / "drivers" / "trl.py"]
    for package in ("kl_plugins", "kl_plugins.adapters.trl", "kl_plugins.patches.trl"):
        folder = Path(str(import_module(package).__file__)).parent
        files += sorted(f for f in folder.rglob("*.py") if not {"cli", "explain"} & set(f.parts))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run_key(settings: Settings, arm: str, seed: int, code: str) -> str:
    """Return a key of a run, made from everything that it depends on.

    The model enters by its configuration and the size of its weights.

    Args:
        settings: settings of the run.
        arm: name of the arm.
        seed: seed of the rollouts.
        code: the digest from `sources`.
    """
    folder = Path(settings.model)
    model: list[Any] = [(folder / "config.json").read_text(), sum(f.stat().st_size for f in folder.glob("*.safet*"))]
    parts = [{**asdict(settings), "model": model}, arm, seed, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


RUN_FILES = ("tasks", "settings", "decode", "sampler", "measure", "train")
