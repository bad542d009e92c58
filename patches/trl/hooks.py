"""The functions of TRL that are wrapped, and by what; and the new field of its configs."""

from __future__ import annotations

from functools import partial

from kl_plugins.adapters.trl import FIELD, HOST
from kl_plugins.adapters.trl.config import HELP
from kl_plugins.patches.engine.dataclass_field import FieldPatch
from kl_plugins.patches.engine.patch import Patch, PatchSet, Wrapper, checked_patch
from kl_plugins.patches.trl import HOOKS, grpo, rloo, trainer


def _patch(module: str, qualname: str, wrapper: Wrapper) -> Patch:
    path = f"trl.trainer.{module}"
    return checked_patch(HOOKS.sources.checked, path, qualname, wrapper)


PATCHES = PatchSet(
    HOST,
    (
        _patch("grpo_config", "GRPOConfig.__post_init__", partial(trainer.post_init, "GRPO")),
        _patch("grpo_trainer", "GRPOTrainer.__init__", partial(trainer.init, "GRPO")),
        _patch("grpo_trainer", "GRPOTrainer._get_per_token_logps_and_entropies", trainer.record_log_probs),
        _patch("grpo_trainer", "GRPOTrainer._generate_and_score_completions", grpo.generate_and_score),
        _patch("grpo_trainer", "GRPOTrainer._calculate_rewards", grpo.calculate_rewards),
        _patch("grpo_trainer", "GRPOTrainer._compute_loss", grpo.compute_loss),
        _patch("rloo_config", "RLOOConfig.__post_init__", partial(trainer.post_init, "RLOO")),
        _patch("rloo_trainer", "RLOOTrainer.__init__", partial(trainer.init, "RLOO")),
        _patch("rloo_trainer", "RLOOTrainer._get_per_token_logps_and_entropies", trainer.record_log_probs),
        _patch("rloo_trainer", "RLOOTrainer._generate_and_score_completions", rloo.generate_and_score),
        _patch("rloo_trainer", "RLOOTrainer._compute_loss", rloo.compute_loss),
    ),
)
"""Every hook, in the order in which receipts name them."""

FIELDS = tuple(
    FieldPatch(f"trl.trainer.{module}", name, FIELD, str | None, None, HELP)
    for module, name in (("grpo_config", "GRPOConfig"), ("rloo_config", "RLOOConfig"))
)
"""The ``kl`` field of both configs."""
