"""The description of a run: the settings that all runs share, and the cell, which differs between runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.demo import arms
from benchmarks.demo.arms import Arm

FAMILIES = ("qwen2", "llama")  # transformers' model types
SIZES = {"tiny": (32, 2), "small": (256, 6), "medium": (768, 12)}  # width and layers of models made here
DELAYS = (0, 1, 4, 16)
PRECISIONS = ("fp32", "bf16")
UNHASHED = (
    "__main__",
    "claims",
    "comparison",
    "verdicts",
    "plan",
    "plot",
    "summary",
)  # These files judge runs and do not make them.
TESTED = {
    "verl": ("workers", "remote", "ray_support"),
    "openrlhf": ("harness", "rollouts", "remote", "command_line", "ray_support"),
}  # These files of a host's tests are used by its runs.


@dataclass(frozen=True)
class Settings(arms.Settings):
    """The demo's settings, with a sampler instead of TRL's own generation, and the model.

    There is one update per rollout. The policy-gradient term always divides by the sampler's true probabilities, within
    TRL's clipping. The arms differ only in the KL.
    """

    steps: int = 300
    evaluate_every: int = 15
    pretrain_rate: float = 6e-3
    optimizer: str = "adamw"  # or `sgd`, without momentum, only in TRL
    size: str = "tiny"  # size of models that are made here
    model: str = ""  # a local path or hub name, instead of a model made here
    device: str = "cpu"
    evaluation_samples: int = 64  # completions per prompt if a vocabulary is too large to enumerate


@dataclass(frozen=True, order=True)
class Cell:
    """One run without its seed.

    Attributes:
        task: a name in `tasks.TASKS`.
        family: family of the model.
        arm: `none`, a canonical KL spec, or (only in TRL) a name in `arms.NATIVE`.
        delay: number of updates that the sampler is behind the policy.
        precision: precision in which the sampler computes.
        host: host that trains.
    """

    task: str
    family: str
    arm: str
    delay: int = 0
    precision: str = "fp32"
    host: str = "trl"

    @property
    def regulariser(self) -> Arm:
        """Return the demo's arm of the same name."""
        return Arm(self.arm, self.arm)

    @property
    def slug(self) -> str:
        """Return a name for files and logs."""
        return "-".join((
            self.host, self.task, self.family, self.regulariser.slug, f"delay{self.delay}", self.precision
        ))  # fmt: skip


def sources(host: str) -> str:
    """Return a digest of all code that the numbers of this host's runs depend on."""
    here = Path(__file__).parent
    of_others = {file.stem for file in here.glob("*_host*.py") if not file.stem.startswith(host)}
    files = {file for file in here.glob("*.py") if file.stem not in of_others.union(UNHASHED)}
    tested = here.parents[1] / "tests" / "support" / host
    files |= {tested / f"{stem}.py" for stem in TESTED.get(host, ())}
    files |= set((here.parent / "drivers").glob(f"{host}*.py"))
    return arms.sources(files, host)


def run_key(settings: Settings, cell: Cell, seed: int, code: str) -> str:
    """Return the key of a run. It changes with every setting, the cell, the seed and the code."""
    return _digest([asdict(settings), asdict(cell), seed, code])


def reference_key(settings: Settings, task: str, family: str, code: str) -> str:
    """Return the key of a reference model, which changes with everything that the model depends on."""
    used = {k: v for k, v in asdict(settings).items() if k.startswith("pretrain") or k in ("size", "model", "beta")}
    return _digest([used, task, family, code])


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
