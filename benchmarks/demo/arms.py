"""The arms that the demonstration compares, and their common settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The settings of a run; runs with different settings are never mixed.

    The batch is on-policy (one update per rollout). Off-policy, `k1@loss` is worse than no KL, because its expected
    gradient then pushes the policy away from the behaviour policy. Rewards are centred in their group and not divided
    by their standard deviation, and all tokens have the same weight (Dr. GRPO), so that the objective is E[R] - beta KL
    with a known optimum.
    """

    steps: int = 300  # optimizer steps, each on one fresh rollout
    prompts: int = 8  # per step; each prompt occurs once
    generations: int = 16  # completions per prompt
    beta: float = 0.2  # coefficient of every arm that has a KL term
    learning_rate: float = 2e-3  # of AdamW; it falls linearly to 0
    max_grad_norm: float = 1.0
    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    evaluate_every: int = 20  # number of steps between evaluations
    pretrain_steps: int = 1500
    pretrain_seed: int = 0


NATIVE = {"native-k3": False, "native-bias-corrected": True}
"""Arms with TRL's own KL, and their values of `use_bias_correction_kl`.

With it, TRL multiplies k3 by the differentiated importance weight, which has the gradient of k2@loss/is:token. This is
TRL's default since 1.10. Without it, k3 is used as published for GRPO.
"""


@dataclass(frozen=True)
class Arm:
    """One regulariser.

    Attributes:
        name: name on the command line: `none`, `native-k3`, `native-bias-corrected`, or a KL spec.
        label: name in the table and the plot.
    """

    name: str
    label: str

    @property
    def spec(self) -> str | None:
        """The KL spec for TRL's field `kl`; None uses TRL's own code unchanged."""
        return None if self.name == "none" or self.name in NATIVE else self.name

    @property
    def slug(self) -> str:
        """The name in a form that file names can have."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower())


NONE = Arm("none", "no KL")
K1_LOSS = Arm("k1@loss/allow:biased", "k1@loss")
NATIVE_K3 = Arm("native-k3", "k3, TRL's own")
NATIVE_CORRECTED = Arm("native-bias-corrected", "TRL's own default")
K2_LOSS = Arm("k2@loss/is:token", "k2@loss/is:token")
K1_ADVANTAGE = Arm("k1@advantage", "k1@advantage")
ARMS = (NONE, K1_LOSS, NATIVE_K3, K2_LOSS, K1_ADVANTAGE)


def find_arm(name: str) -> Arm:
    """Return the arm of a name; every KL spec is the name of an arm.

    Raises:
        KLSpecError: The name is neither one of the arms nor a KL spec.
    """
    from kl_plugins import KLSpec

    known = {arm.name: arm for arm in (*ARMS, NATIVE_CORRECTED)}
    if name in known:
        return known[name]
    spec = str(KLSpec.parse(name))
    return known.get(spec, Arm(spec, spec))


def sources(more: Iterable[Path] = (), host: str = "trl") -> str:
    """Return a digest of the code that a finished run depends on: the installed packages, kl-plugins and this demo.

    Args:
        more: further files that the runs depend on.
        host: name of the framework that trains.
    """
    digest = hashlib.sha256()
    for name in ("torch", host, "transformers", "accelerate", "tokenizers"):
        digest.update(f"{name}=={version(name)}\n".encode())
    here = Path(__file__).parent
    files = [here / f"{stem}.py" for stem in ("arms", "task", "model", "evaluate", "train", "curve")]
    files += [here.parent / "drivers" / "trl.py", *sorted(more)]
    for package in ("kl_plugins", f"kl_plugins.adapters.{host}", f"kl_plugins.patches.{host}"):
        folder = Path(str(import_module(package).__file__)).parent
        files += sorted(f for f in folder.rglob("*.py") if "cli" not in f.parts and "explain" not in f.parts)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def fingerprint(settings: Settings, arm: Arm | None, seed: int, code: str) -> str:
    """Return a key of a run, made from everything that the run depends on.

    Args:
        settings: settings of the demo.
        arm: the regulariser; None gives the key of the reference model, which depends on fewer settings.
        seed: seed of the run.
        code: the digest from `sources`.
    """
    used = {k: v for k, v in asdict(settings).items() if arm is not None or k.startswith("pretrain")}
    text = json.dumps([used, arm and arm.name, seed, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
