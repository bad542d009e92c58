"""``top:``: the reference's most probable tokens, recorded where TRL scores the reference and used in its updates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from kl_plugins.adapters.trl import exact as adapter
from kl_plugins.patches.trl import exact as patches
from kl_plugins.patches.trl import fused_head
from tests.support import garbage
from tests.support.trl import kernels, trainers
from tests.support.trl.states import TEMPERATURE, by_hand, capped_model, moved_on

SHARED, OWN = "TRL's head", "own head"
"""``top:`` reads TRL's fused head where it knows it, and multiplies the policy's head once more elsewhere."""


@pytest.fixture(params=[SHARED, OWN], autouse=True)
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == OWN:
        monkeypatch.setattr(fused_head, "is_known", lambda: False)
    assert fused_head.is_known() == (request.param == SHARED)
    return request.param


K = 3
"""Tokens of 15 in the set, so that part of the drawn tokens lie in the bucket."""

MEAN = {"loss_type": "bnpo"}
"""TRL then takes the mean over the tokens of the micro-batch."""

BATCHED: dict[str, Any] = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
"""TRL then scores the eight rows of a rollout in two passes."""


def gradient_of(built: Any, loss: torch.Tensor) -> torch.Tensor:
    built.model.zero_grad()
    loss.backward()
    return trainers.gradient(built)


def check_gradient(built: Any, inputs: dict[str, Any], is_token: bool) -> None:
    """The gradient of TRL's training step is that of the definition: set, bucket, and the drawn token's remainder."""
    ours = gradient_of(built, built.compute_loss(built.model, inputs))
    mask = inputs["completion_mask"].bool()
    kl, logp, _, remainder = by_hand(built, inputs, K)
    assert 0 < (remainder != 0).sum() < mask.sum(), "some drawn tokens should lie in the set, and others not"
    weight = (logp - inputs["old_per_token_logps"]).detach().exp() if is_token else 1.0
    term = (kl + weight * remainder * logp).masked_fill(~mask, 0.0)
    expected = gradient_of(built, built.beta * term.sum() / mask.sum())
    assert expected.norm() > 0
    assert (ours - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("spec", [f"exact@loss/top:{K}", f"exact@loss/top:{K}/is:token/behaviour:old"])
@pytest.mark.parametrize("settings", [{}, BATCHED, {"lora": True}, {"lora": True, "gradient_checkpointing": True}])
def test_gradient_is_that_of_set_bucket_and_drawn_token(
    spec: str, settings: dict[str, Any], model: str, tmp_path: Path
) -> None:
    check_gradient(*moved_on(model, tmp_path, spec, **MEAN, **settings), is_token="is:token" in spec)


def test_an_adapter_that_is_trained_on_has_its_first_state_as_reference(model: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    built, inputs = moved_on(trained, tmp_path, f"exact@loss/top:{K}", tokenizer=tokenizer, **MEAN)
    assert "ref" in built.model.peft_config
    check_gradient(built, inputs, is_token=False)


def test_soft_cap_of_both_models_is_kept(model: str, tmp_path: Path) -> None:
    built, inputs = moved_on(capped_model(model, tmp_path / "capped"), tmp_path, f"exact@loss/top:{K}", **MEAN)
    check_gradient(built, inputs, is_token=False)


@pytest.mark.parametrize("head", [SHARED], indirect=True)
@pytest.mark.parametrize("settings", [{}, BATCHED])
def test_with_kernels_the_head_scores_attended_tokens_alone(
    settings: dict[str, Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.use(monkeypatch)
    built, inputs = moved_on(
        model, tmp_path, f"exact@loss/top:{K}", mask_truncated_completions=False, **MEAN, **settings
    )
    assert not inputs["completion_mask"].all()
    check_gradient(built, inputs, is_token=False)


def test_a_step_leaves_nothing_to_the_garbage_collector(model: str, tmp_path: Path) -> None:
    """Tensors of a micro-batch must not stay in memory until Python's garbage collector runs."""
    built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl=f"exact@loss/top:{K}")
    trainers.rollout_and_gradient(built)
    garbage.watch()
    trainers.rollout_and_gradient(built)
    assert garbage.watched() == []


def test_later_terms_take_set_bucket_and_remainder(model: str, tmp_path: Path) -> None:
    spec = f"exact@loss/top:{K}/horizon:sequence/is:decision/behaviour:old"
    built, inputs = moved_on(model, tmp_path, spec, **MEAN)
    ours = gradient_of(built, built.compute_loss(built.model, inputs))
    mask = inputs["completion_mask"].bool()
    kl, logp, ref_logp, remainder = by_hand(built, inputs, K)
    old = inputs["old_per_token_logps"]
    term = kl_term(KLSpec.parse(spec), logp, ref_logp, mask, old_logp=old, exact=kl, remainder=remainder)
    expected = gradient_of(built, built.beta * term.loss.sum() / mask.sum())
    assert (ours - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("settings", [BATCHED, {"lora": True}], ids=["batched", "lora"])
def test_penalty_of_an_advantage(
    trainer: type, config: type, settings: dict[str, Any], model: str, tmp_path: Path
) -> None:
    spec = f"exact@advantage/top:{K}"
    built = trainers.build(trainer, config, model, tmp_path, kl=spec, temperature=TEMPERATURE, **settings)
    trainers.shift(built, 0.05)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    with torch.no_grad():
        kl, logp, ref_logp, remainder = by_hand(built, inputs, K)
    mask = inputs["completion_mask"].bool()
    expected = kl_penalty(KLSpec.parse(spec), logp, ref_logp, mask, exact=kl, remainder=remainder)
    assert (remainder != 0).any()
    torch.testing.assert_close(inputs["kl_plugins_penalty"], expected.float(), rtol=1e-3, atol=1e-4)
    assert KEY not in inputs


def passes_of(built: Any, step: Callable[[], Any]) -> int:
    """How often the reference's backbone runs."""
    seen: list[None] = []
    handle = built.ref_model.base_model.register_forward_hook(lambda *_: seen.append(None))
    try:
        step()
    finally:
        handle.remove()
    return len(seen)


@pytest.mark.parametrize("spec", [f"exact@loss/top:{K}", f"exact@advantage/top:{K}"])
def test_the_reference_runs_only_where_trl_scores_it(spec: str, model: str, tmp_path: Path) -> None:
    built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec)
    found: list[dict[str, Any]] = []
    rows = [built.train_dataset[i // 4] for i in range(8)]
    built.current_gradient_accumulation_steps = 1
    assert passes_of(built, lambda: found.append(built._generate_and_score_completions(rows))) == 1
    assert passes_of(built, lambda: built.compute_loss(built.model, found[0])) == 0


def test_one_model_that_is_both_is_recorded_as_the_reference_only(
    head: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = trainers.build(
        GRPOTrainer, GRPOConfig, model, tmp_path, kl=f"exact@loss/top:{K}", lora=True, num_iterations=2
    )
    name = "packed" if head == SHARED else "top_k_of_states"
    original, recorded = getattr(patches, name), []

    def record(*given: Any) -> torch.Tensor:
        recorded.append(original(*given))
        return recorded[-1]

    monkeypatch.setattr(patches, name, record)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    assert "old_per_token_logps" in inputs, "TRL should have scored the policy as well"
    assert len(recorded) == 1


TRAINING: dict[str, Any] = {
    "num_iterations": 2, "max_steps": 4, "temperature": TEMPERATURE, "max_completion_length": 14, "seed": 3,
    "mask_truncated_completions": True, "learning_rate": 1e-2, "loss_type": "dapo", **BATCHED,
}  # fmt: skip
"""Rollouts that TRL shuffles, splits and uses twice; some completions are cut off and count for nothing."""


def trained(model: str, folder: Path, spec: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {**TRAINING, **changes}
    built = trainers.build(GRPOTrainer, GRPOConfig, model, folder, reward=trainers.zero_reward, kl=spec, **settings)
    trainers.shift(built, 0.1)
    built.train()
    return built


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_whole_vocabulary_in_the_set_is_exact(lora: bool, model: str, tmp_path: Path) -> None:
    exact, top = (trained(model, tmp_path, spec, lora=lora) for spec in ("exact@loss", "exact@loss/top:64"))
    for key in ("kl/exact", "loss", "grad_norm"):
        assert trainers.log_of(top, key) == pytest.approx(trainers.log_of(exact, key), rel=1e-3, abs=1e-6), key
    assert min(trainers.log_of(top, "kl/exact")) > 1e-3
    assert 0 < min(trainers.log_of(top, "completions/clipped_ratio")) < 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_many_draws_are_exact(lora: bool, model: str, tmp_path: Path) -> None:
    """The draws take the place of the drawn token; the more of them, the nearer are the exact KL and its gradient."""
    built, inputs = moved_on(model, tmp_path, f"exact@loss/top:{K}/draws:3000", lora=lora, **MEAN)
    ours = gradient_of(built, built.compute_loss(built.model, inputs))
    mask = inputs["completion_mask"].bool()
    kl, *_ = by_hand(built, inputs)
    expected = gradient_of(built, built.beta * kl.masked_fill(~mask, 0.0).sum() / mask.sum())
    assert (ours - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_many_draws_of_an_advantage_are_exact(trainer: type, config: type, model: str, tmp_path: Path) -> None:
    spec = f"exact@advantage/top:{K}/draws:4000"
    built = trainers.build(trainer, config, model, tmp_path, kl=spec, temperature=TEMPERATURE)
    trainers.shift(built, 0.05)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    with torch.no_grad():
        kl, logp, ref_logp, _ = by_hand(built, inputs)
    mask = inputs["completion_mask"].bool()
    expected = kl_penalty(KLSpec.parse("exact@advantage"), logp, ref_logp, mask, exact=kl).float()
    assert (inputs["kl_plugins_penalty"] - expected)[mask].norm() / expected[mask].norm() < 0.1


def test_draws_leave_the_random_numbers_of_the_host_alone(model: str, tmp_path: Path) -> None:
    states = []
    for spec in (f"exact@loss/top:{K}", f"exact@loss/top:{K}/draws:4"):
        built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec)
        torch.manual_seed(5)
        inputs, _, _ = trainers.rollout_and_gradient(built)
        states.append((torch.random.get_rng_state(), inputs["completion_ids"]))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


class Reordered(GRPOTrainer):
    """Reorders what it does not know of."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, KEY: inputs[KEY].roll(1, self.axis)}


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "positions"])
def test_numbers_of_other_tokens_stop_the_run(axis: int, model: str, tmp_path: Path) -> None:
    built = trainers.build(Reordered, GRPOConfig, model, tmp_path, kl="exact@loss/top:8")
    built.axis = axis
    with pytest.raises(RuntimeError, match=r"most probable tokens differ from .*belong to other tokens"):
        built.train()


@pytest.mark.parametrize("head", [OWN], indirect=True)
@pytest.mark.parametrize("spec", ["exact@loss/top:8", "exact@advantage/top:8"])
def test_a_reference_that_is_more_than_its_head_shows_is_refused(
    spec: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec)
    honest, policy = adapter.head_of, built.model
    monkeypatch.setattr(
        "kl_plugins.patches.trl.exact.head_of", lambda m: honest(m)._replace(scale=1.0 if m is policy else 1.5)
    )
    with pytest.raises(RuntimeError, match=r"differ from TRL's own by .*more than its output head shows"):
        built.train()


def test_numbers_that_are_missing_stop_the_run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="exact@loss/top:8")
    inputs, _, _ = trainers.rollout_and_gradient(built)
    with pytest.raises(RuntimeError, match=f"carry {KEY} along"):
        built.compute_loss(built.model, {key: value for key, value in inputs.items() if key != KEY})
    monkeypatch.setattr("kl_plugins.patches.trl.exact.TrainerStates._is_reference", lambda *_: False)
    with pytest.raises(RuntimeError, match="forward pass was not seen while TRL scored a rollout"):
        trainers.rollout_and_gradient(built)


def test_start_says_what_the_numbers_cost(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="exact@loss/top", max_steps=1).train()
    assert "costs 58 numbers (232 bytes) per token from the reference's pass" in capfd.readouterr().err
