"""What cannot be regularised as named is refused, before training, with the reason."""

import importlib

import pytest
import torch
import trl
from packaging.version import Version

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from kl_plugins.adapters.trl.config import WITH_KNOWN_HEAD, installed
from tests.support.trl import trainers


@pytest.mark.parametrize(
    ("cls", "changes", "reason"),
    [
        (GRPOConfig, {"kl": "k2@loss", "beta": 0.0}, "no reference model"),
        (GRPOConfig, {"kl": "k2@loss/beta:dual-0.1-0.1", "beta": 0.0}, "no reference model"),
        (RLOOConfig, {"kl": "k1@reward", "beta": 0.0}, "no reference model"),
        (GRPOConfig, {"kl": "k2@loss", "beta": -0.1}, "negative"),
        (RLOOConfig, {"kl": "k2@loss"}, "k1@reward"),
        (GRPOConfig, {"kl": "k1@reward", "multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        (GRPOConfig, {"kl": "k1@advantage", "off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        (GRPOConfig, {"kl": "k1@advantage", "loss_type": "vespo"}, "vespo"),
        (GRPOConfig, {"kl": "k1@advantage", "top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        (
            GRPOConfig,
            {"kl": "k1@advantage", "loss_type": "sapo", "importance_sampling_level": "sequence"},
            "sapo.*importance_sampling_level",
        ),
        (GRPOConfig, {"kl": "k2@loss", "generation_kwargs": {"temperature": 0.5}}, "temperature 0.5.*scores with 1"),
    ],
)
def test_contradictions_in_the_config(cls, changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        cls(**trainers.settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        ("1.13.0", {"use_liger_kernel": True}, "Liger"),
        ("1.14.0", {"use_liger_kernel": True}, None),
        ("1.9.0", {"loss_type": "luspo", "kl": "k1@advantage"}, "luspo"),
        ("1.10.0", {"loss_type": "luspo", "kl": "k1@advantage"}, None),
        ("1.9.0", {"loss_type": "luspo", "kl": "k2@loss"}, "luspo"),
        ("1.9.0", {"loss_type": "luspo", "kl": "k1@reward"}, None),
    ],
)
def test_contradictions_of_old_versions(version, changes, reason, tmp_path):
    from types import SimpleNamespace

    from kl_plugins import KLSpec
    from kl_plugins.adapters.trl.refusals import contradictions

    spec = changes.pop("kl", "k2@loss") if "kl" in changes else "k2@loss"
    settings = SimpleNamespace(**{"beta": 0.1, "loss_type": "dapo", "importance_sampling_level": "token", **changes})
    found = list(contradictions(KLSpec.parse(spec), settings, "GRPO", Version(version)))
    assert [reason in problem for problem in found] == ([True] if reason else [])


def test_sampler_log_probs_that_nobody_gives(model, tmp_path):
    with pytest.raises(ValueError, match="use_vllm"):
        trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss/is:token/behaviour:sampler")


def test_gmpo_keeps_its_own_kl_and_is_refused(model, tmp_path):
    try:
        gmpo = importlib.import_module("trl.experimental.gmpo")
    except ImportError:
        pytest.skip("this TRL has no GMPO")
    from kl_plugins.adapters.trl import attach

    attach()
    cls = gmpo.GMPOTrainer
    args = GRPOConfig(**trainers.settings(tmp_path, kl="k2@loss"))
    with pytest.raises(ValueError, match="_compute_loss"):
        cls(model, trainers.even_reward, args=args, train_dataset=trainers.prompts())


class GoesAround(GRPOTrainer):
    """Mentions super() and does not use it: no look at the code can tell."""

    def _compute_loss(self, model, inputs):
        if inputs is None:
            return super()._compute_loss(model, inputs)
        return model(inputs["completion_ids"]).logits.sum() * 0.0


def test_a_trainer_that_goes_around_the_seam_stops_before_the_first_update(model, tmp_path):
    built = trainers.build(GoesAround, GRPOConfig, model, tmp_path, kl="k2@loss")
    before = trainers.shift, [p.detach().clone() for p in built.model.parameters()]
    with pytest.raises(RuntimeError, match="not applied before update 1"):
        built.train()
    for old, new in zip(before[1], built.model.parameters(), strict=True):
        assert old.equal(new)


class CallsSuper(GRPOTrainer):
    """What TRL documents for its users."""

    def _compute_loss(self, model, inputs):
        return 2 * super()._compute_loss(model, inputs)


def test_a_subclass_that_calls_super_is_welcome(model, tmp_path):
    built = trainers.build(CallsSuper, GRPOConfig, model, tmp_path, kl="k2@loss")
    built.train()
    assert trainers.log_of(built, "kl/active") == [1.0, 1.0]


class OwnRewards(GRPOTrainer):
    """Replaces what only @reward works through."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return torch.tensor([[float(i % 2)] for i in range(len(prompts))])


class OwnRollout(GRPOTrainer):
    """Replaces what only scores and specs with ``top:`` work through."""

    def _generate_and_score_completions(self, inputs):
        return trl.GRPOTrainer._generate_and_score_completions(self, inputs)


def test_a_subclass_is_refused_only_over_what_the_spec_works_through(model, tmp_path):
    for cls, spec in (
        (OwnRewards, "k2@loss"),
        (OwnRewards, "k1@advantage"),
        (OwnRollout, "k2@loss"),
        (OwnRollout, "exact@loss"),
    ):
        built = trainers.build(cls, GRPOConfig, model, tmp_path, kl=spec, max_steps=1)
        built.train()
        assert trainers.log_of(built, "kl/active") == [1.0]
    for cls, spec, method in (
        (OwnRewards, "k1@reward", "_calculate_rewards"),
        (OwnRollout, "exact@loss/top:8", "_generate_and_score_completions"),
        (OwnRollout, "k1@advantage", "_generate_and_score_completions"),
    ):
        with pytest.raises(ValueError, match=f"own {method} never calls"):
            trainers.build(cls, GRPOConfig, model, tmp_path, kl=spec)


@pytest.mark.parametrize("spec", ["exact@loss", "exact@advantage"])
def test_exact_terms_under_zero_3(spec, monkeypatch, tmp_path):
    from transformers.integrations import deepspeed

    class Zero3:
        """Stands for a DeepSpeed config, without DeepSpeed in the process."""

        def is_zero3(self):
            return True

    settings = trainers.settings(tmp_path)
    there = Zero3()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: there)
    with pytest.raises(ValueError, match=r"ZeRO-3.*sampled spec"):
        GRPOConfig(**settings, kl=spec)
    GRPOConfig(**settings, kl="k2@loss")
    # benchmarks.llm.sharded runs it.
    if installed() >= WITH_KNOWN_HEAD:
        GRPOConfig(**settings, kl=f"{spec}/top")
        GRPOConfig(**settings, kl=f"{spec}/top:16/draws:8")
    else:
        with pytest.raises(ValueError, match="ZeRO-3"):
            GRPOConfig(**settings, kl=f"{spec}/top")


def test_detaching_in_the_middle_does_not_go_unnoticed(model, tmp_path):
    from kl_plugins.adapters.trl import attach, detach

    attach()
    built = trainers.build(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, kl="k2@loss")
    detach()
    with pytest.raises(RuntimeError, match="not applied"):
        built.train()


def test_unknown_version_is_refused(monkeypatch):
    from kl_plugins.adapters import versions
    from kl_plugins.adapters.trl import attach

    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(versions.UnsupportedHostError, match=r"1\.17\.0"):
        attach()


def test_changed_source_is_refused(monkeypatch):
    from kl_plugins.adapters.trl import attach
    from kl_plugins.adapters.versions import UnsupportedHostError

    def _compute_loss(self, model, inputs):
        return 0

    monkeypatch.setattr(trl.RLOOTrainer, "_compute_loss", _compute_loss)
    with pytest.raises(UnsupportedHostError, match=r"RLOOTrainer\._compute_loss"):
        attach()
    assert "kl" not in trl.GRPOConfig.__dataclass_fields__


def test_a_file_of_trl_that_was_edited_is_refused_where_a_spec_is_used(monkeypatch, tmp_path):
    from kl_plugins.adapters.versions import UnsupportedHostError
    from kl_plugins.patches.trl import HOOKS

    name = "trl.trainer.rloo_trainer:RLOOTrainer._compute_loss"
    monkeypatch.setitem(HOOKS.sources.installed, name, "0" * 16)
    GRPOConfig(**trainers.settings(tmp_path))
    with pytest.raises(
        UnsupportedHostError, match=r"rloo_trainer\.RLOOTrainer\._compute_loss of trl .* is not the code"
    ):
        GRPOConfig(**trainers.settings(tmp_path, kl="k2@loss"))


def test_rloo_trainer_takes_both_scores(model, tmp_path):
    for spec in ("k1@reward", "k1@advantage"):
        trainers.build(RLOOTrainer, RLOOConfig, model, tmp_path, kl=spec)
