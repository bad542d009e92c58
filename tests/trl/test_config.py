"""The ``kl`` field: parsed early, picklable, seen by TRL's parsers, and gone after ``detach``."""

import dataclasses
import inspect
import pickle

import pytest
import trl

from kl_plugins import KLSpecError
from kl_plugins.adapters import trl as adapter
from kl_plugins.patches.engine.patch import Hook
from tests.support.trl import trainers


def config(cls, tmp_path, **changes):
    return cls(**trainers.settings(tmp_path, **changes))


@pytest.mark.parametrize("name", ["GRPOConfig", "RLOOConfig"])
def test_pickles(name, tmp_path):
    made = config(getattr(adapter, name), tmp_path, kl="k1@reward")
    again = pickle.loads(pickle.dumps(made))
    assert again.kl == "k1@reward"
    assert again.to_dict()["kl"] == "k1@reward"


@pytest.mark.parametrize("name", ["GRPOConfig", "RLOOConfig"])
def test_a_typo_fails_before_any_model_is_loaded(name, tmp_path):
    with pytest.raises(KLSpecError, match="reward"):
        config(getattr(adapter, name), tmp_path, kl="k1@rewrad")


def test_a_bare_native_value_is_no_spec(tmp_path):
    with pytest.raises(KLSpecError):
        config(adapter.GRPOConfig, tmp_path, kl="k2")


def test_attach_gives_the_field_and_detach_takes_it(tmp_path):
    original = {
        (cls, name): inspect.getattr_static(cls, name)
        for cls in (trl.GRPOConfig, trl.GRPOTrainer, trl.RLOOConfig, trl.RLOOTrainer)
        for name in (
            "__init__",
            "__post_init__",
            "_compute_loss",
            "_generate_and_score_completions",
            "_calculate_rewards",
        )
        if hasattr(cls, name)
    }
    fields = [field.name for field in dataclasses.fields(trl.GRPOConfig)]
    adapter.attach()
    adapter.attach()
    parser = trl.TrlParser((trl.GRPOConfig,))
    (parsed,) = parser.parse_args_and_config(
        [
            "--output_dir",
            str(tmp_path),
            "--beta",
            "0.1",
            "--use_cpu",
            "--bf16",
            "false",
            "--kl",
            "k2@loss/is:token/cap:2",
        ]
    )
    assert type(parsed) is trl.GRPOConfig
    assert parsed.kl == "k2@loss/is:token/cap:2"
    assert "k2@loss/is:token" in parser.format_help()
    assert pickle.loads(pickle.dumps(parsed)).kl == parsed.kl
    adapter.detach()
    adapter.detach()
    assert [field.name for field in dataclasses.fields(trl.GRPOConfig)] == fields
    for (cls, name), function in original.items():
        assert inspect.getattr_static(cls, name) is function
        assert not isinstance(function, Hook)
    with pytest.raises(TypeError, match="kl"):
        config(trl.GRPOConfig, tmp_path, kl="k2@loss")


def test_attached_classes_train_under_the_spec(model, tmp_path):
    adapter.attach()
    in_place = trainers.build(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, kl="k2@loss", learning_rate=1e-2)
    in_place.train()
    adapter.detach()
    subclass = trainers.build(
        adapter.GRPOTrainer, adapter.GRPOConfig, model, tmp_path, kl="k2@loss", learning_rate=1e-2
    )
    subclass.train()
    assert trainers.log_of(in_place, "kl/coef/max")[-1] > 0
    for key in ("loss", "kl/coef/max"):
        assert trainers.log_of(in_place, key) == trainers.log_of(subclass, key)


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_a_spec_in_a_stock_trainer_is_an_error(algorithm, model, tmp_path):
    config, trainer = getattr(adapter, f"{algorithm}Config"), getattr(trl, f"{algorithm}Trainer")
    hooks = inspect.getattr_static(trainer, "_compute_loss")
    with pytest.raises(RuntimeError, match=r"kl-plugins: .*would ignore.*attach"):
        trainers.build(trainer, config, model, tmp_path, kl="k1@reward")
    assert inspect.getattr_static(trainer, "_compute_loss") is hooks, "a config must not change TRL's classes"
    trainers.build(trainer, config, model, tmp_path, kl=None)
    # A config that has been used and saved does not pass either.
    used = trainers.build(getattr(adapter, f"{algorithm}Trainer"), config, model, tmp_path, kl="k1@reward").args
    with pytest.raises(RuntimeError, match="would ignore"):
        trainer(model, trainers.even_reward, args=pickle.loads(pickle.dumps(used)), train_dataset=trainers.prompts())
    adapter.attach()
    built = trainers.build(trainer, config, model, tmp_path, kl="k1@reward", max_steps=1)
    built.train()
    assert trainers.log_of(built, "kl/active") == [1.0]


def test_a_users_config_class_derived_after_attach_has_the_field(tmp_path):
    adapter.attach()

    @dataclasses.dataclass
    class Mine(trl.GRPOConfig):
        extra: int = 0

    with pytest.raises(KLSpecError):
        config(Mine, tmp_path, kl="k9@loss")
    assert config(Mine, tmp_path, kl="k2@loss", extra=3).kl == "k2@loss"
