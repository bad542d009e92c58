"""Which functions of TRL are wrapped, and by what."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.trl.config import FIELD, HELP
from kl_plugins.adapters.trl.host import SUPPORTED
from kl_plugins.patches.dataclass_field import FieldPatch
from kl_plugins.patches.patch import Patch, PatchSet, Wrapper
from kl_plugins.patches.trl import grpo, rloo, shared
from kl_plugins.patches.trl.fingerprints import FINGERPRINTS

VERSIONS = SpecifierSet(SUPPORTED)


def _patch(module: str, qualname: str, wrapper: Wrapper) -> Patch:
    return Patch(f"trl.trainer.{module}", qualname, wrapper, FINGERPRINTS.get(qualname, {}))


GRPO_CONFIG = (_patch("grpo_config", "GRPOConfig.__post_init__", grpo.post_init),)
RLOO_CONFIG = (_patch("rloo_config", "RLOOConfig.__post_init__", rloo.post_init),)

GRPO_TRAINER = (
    _patch("grpo_trainer", "GRPOTrainer.__init__", grpo.init),
    _patch("grpo_trainer", "GRPOTrainer._get_per_token_logps_and_entropies", shared.record_log_probs),
    _patch("grpo_trainer", "GRPOTrainer._generate_and_score_completions", grpo.generate_and_score),
    _patch("grpo_trainer", "GRPOTrainer._calculate_rewards", grpo.calculate_rewards),
    _patch("grpo_trainer", "GRPOTrainer._compute_loss", grpo.compute_loss),
)
RLOO_TRAINER = (
    _patch("rloo_trainer", "RLOOTrainer.__init__", rloo.init),
    _patch("rloo_trainer", "RLOOTrainer._get_per_token_logps_and_entropies", shared.record_log_probs),
    _patch("rloo_trainer", "RLOOTrainer._generate_and_score_completions", rloo.generate_and_score),
    _patch("rloo_trainer", "RLOOTrainer._compute_loss", rloo.compute_loss),
)

FIELDS = tuple(
    FieldPatch(patches[0].module, patches[0].qualname.split(".")[0], FIELD, str | None, None, HELP)
    for patches in (GRPO_CONFIG, RLOO_CONFIG)
)
IN_PLACE = tuple(
    PatchSet("trl", VERSIONS, patches) for patches in (GRPO_CONFIG, GRPO_TRAINER, RLOO_CONFIG, RLOO_TRAINER)
)


def on_subclass(owner: type, patches: tuple[Patch, ...]) -> None:
    """Put hooks on a subclass of TRL's class, which itself stays as it is."""
    PatchSet("trl", VERSIONS, patches, owner).apply()
