"""``@loss``: the spec's gradient goes through TRL's own masking, aggregation and accumulation."""

from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version

from kl_plugins import KLSpec, kl_term
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from kl_plugins.adapters.trl.refusals import LUSPO_MASKS_PADDING
from tests.support.trl import trainers

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
OFF_POLICY = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "learning_rate": 1e-2}


def known(loss_type: str) -> bool:
    from trl.trainer import grpo_trainer

    return f'"{loss_type}"' in Path(grpo_trainer.__file__).read_text()


def trained(trainer: type, config: type, model: str, folder: Path, **changes: object) -> list[float]:
    changes = {"max_steps": 4, **changes}
    built = trainers.build(trainer, config, model, folder, **changes)
    built.train()
    return trainers.log_of(built, "loss") + trainers.log_of(built, "grad_norm")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_k3_is_the_hosts_k3(loss_type, model, tmp_path):
    if not known(loss_type):
        pytest.skip(f"this TRL has no loss_type {loss_type}")
    if loss_type == "luspo" and Version(trl.__version__) < LUSPO_MASKS_PADDING:
        pytest.skip("this TRL's luspo averages its own k3 over padding, where the spec's term is 0")
    settings = {"loss_type": loss_type, "use_bias_correction_kl": False, **OFF_POLICY}
    host = trained(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, **settings)
    ours = trained(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k3@loss", **settings)
    assert ours == pytest.approx(host, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_terms_are_aggregated_as_the_receipt_says(loss_type, model, tmp_path):
    from kl_plugins.patches.trl.trainer import session_of

    if not known(loss_type) or (loss_type == "luspo" and Version(trl.__version__) < LUSPO_MASKS_PADDING):
        pytest.skip(f"this TRL has no loss_type {loss_type} that is supported")
    built = trainers.build(
        GRPOTrainer, GRPOConfig, model, tmp_path, kl="k3@loss", loss_type=loss_type, reward=trainers.zero_reward,
        scale_rewards="none", max_completion_length=14,
    )  # fmt: skip
    trainers.shift(built)
    inputs, _, loss = trainers.rollout_and_gradient(built)
    mask, lengths = inputs["completion_mask"].bool(), inputs["completion_mask"].sum(-1)
    assert lengths.unique().numel() > 1
    built._metrics["train"].clear()
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logp = built._get_per_token_logps_and_entropies(built.model, ids, attention, mask.shape[1])[0]
    u = (logp - inputs["ref_per_token_logps"]).masked_fill(~mask, 0.0)
    terms = torch.exp(-u) - 1 + u
    said = session_of(built).receipt()
    expected = {
        "sequence mean": (terms.sum(-1) / lengths).mean(),
        "token mean": terms.sum() / mask.sum(),
        "token sum": terms.sum(-1).mean(),
        "constant": terms.sum() / (len(mask) * built.max_completion_length),
    }
    kind = said.aggregation.split(" (")[0]
    assert loss.item() == pytest.approx(built.beta * expected[kind].item(), rel=1e-4)
    others = [value.item() for other, value in expected.items() if other != kind]
    assert all(expected[kind].item() != pytest.approx(value, rel=1e-2) for value in others)
    assert any("1/|y|" in caveat for caveat in said.caveats) == (kind == "sequence mean")


def test_k3_differs_from_another_estimator(model, tmp_path):
    # The comparison above can fail: k2 in the place of k3 shows.
    settings = {"use_bias_correction_kl": False, **OFF_POLICY}
    host = trained(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, **settings)
    other = trained(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss", **settings)
    assert other != pytest.approx(host, rel=1e-4, abs=2e-6)


def off_policy_gradient(trainer: type, config: type, model: str, folder: Path, **changes: object):
    """Gradient of one loss after the policy moved on since the rollout, and since the reference."""
    built = trainers.build(
        trainer, config, model, folder, reward=trainers.zero_reward, num_iterations=2, scale_rewards="none", **changes
    )
    trainers.shift(built, 0.05)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    trainers.shift(built, 0.03, seed=9)
    built.model.zero_grad()
    built.compute_loss(built.model, inputs).backward()
    return trainers.gradient(built), inputs, built


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_k2_with_token_weight_has_the_gradient_of_the_hosts_corrected_k3(loss_type, model, tmp_path):
    settings = {"loss_type": loss_type, "use_bias_correction_kl": True}
    host, _, _ = off_policy_gradient(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, **settings)
    spec = "k2@loss/is:token/behaviour:old"
    ours, _, _ = off_policy_gradient(GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec, **settings)
    plain, _, _ = off_policy_gradient(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss", **settings)
    assert (ours - host).norm() / host.norm() < 1e-5
    assert (plain - host).norm() / host.norm() > 1e-2


@pytest.mark.parametrize(
    "spec",
    [
        "k2@loss/is:token",
        "k2@loss/is:token/floor:0.99",
        "k2@loss/is:prefix/cap:2",
        "k2@loss/is:sequence",
        "k3@loss/is:token/band:0.5-2",
        "k3+@loss/clip:0.2",
        "sequence",
        "jeffreys@loss/is:token/norm",
        "k1@loss/allow:biased",
    ],
)
def test_term_is_cores_on_the_same_tensors(spec, model, tmp_path):
    ours, inputs, built = off_policy_gradient(
        GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec, loss_type="dapo", use_bias_correction_kl=False
    )
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = inputs["completion_mask"].bool()
    assert 0 < mask.sum() < mask.numel(), "completions should end at different lengths"
    logp = built._get_per_token_logps_and_entropies(built.model, ids, attention, mask.shape[1])[0]
    term = kl_term(
        KLSpec.parse(spec), logp, inputs["ref_per_token_logps"], mask, old_logp=inputs["old_per_token_logps"]
    )
    # dapo: the sum over tokens divided by the tokens of the batch; no task reward, so this is all there is.
    built.model.zero_grad()
    (built.beta * term.loss.sum() / inputs["num_items_in_batch"]).backward()
    expected = trainers.gradient(built)
    assert expected.norm() > 0
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_a_floor_that_raises_weights_changes_the_gradient(model, tmp_path):
    found = []
    for spec in ("k2@loss/is:token", "k2@loss/is:token/floor:0.99"):
        gradient, _, built = off_policy_gradient(
            GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec, loss_type="dapo", use_bias_correction_kl=False
        )
        found.append((gradient, built._metrics["train"]["kl/floor_frac"][-1]))
    (plain, none), (floored, share) = found
    assert none == 0.0
    assert share > 0.1
    assert (floored - plain).norm() / plain.norm() > 1e-4


def test_metrics_stand_beside_the_hosts_own(model, tmp_path):
    from kl_plugins.metrics import REDUCTIONS

    settings = {"use_bias_correction_kl": False, **OFF_POLICY}
    host = trainers.build(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path, **settings)
    host.train()
    ours = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k3@loss", **settings)
    ours.train()
    assert trainers.log_of(ours, "kl") == pytest.approx(trainers.log_of(host, "kl"), rel=1e-5)
    # Its value is the same k3; the token counts of micro-batches are what TRL weighs by as well.
    assert trainers.log_of(ours, "kl/value") == pytest.approx(trainers.log_of(ours, "kl"), rel=1e-3)
    for key in set(REDUCTIONS) - {"kl/exact"}:
        assert len(trainers.log_of(ours, key)) == 2, key
    assert trainers.log_of(ours, "kl/active") == [1.0, 1.0]
    assert not trainers.log_of(host, "kl/active")


def test_a_logging_window_is_joined_as_one_batch(model, tmp_path):
    """Maxima are maxima, and means count tokens, over micro-batches and over steps."""
    from kl_plugins.patches.trl.trainer import session_of

    changes = {"kl": "k2@loss/is:token", "max_steps": 3, **OFF_POLICY}
    each = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, **changes)
    largest, tokens, sums = [], [], []
    observe = session_of(each).controller.observe

    def recorded(logp, ref_logp, mask):
        u = (logp - ref_logp)[mask]
        largest.append(u.abs().max().item())
        tokens.append(int(mask.sum()))
        sums.append(u.abs().sum().item())
        observe(logp, ref_logp, mask)

    session_of(each).controller.observe = recorded
    each.train()
    whole = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, **{**changes, "logging_steps": 3})
    whole.train()
    assert len(largest) == 6
    assert len(set(tokens)) > 1
    for key in ("kl/log_ratio/max", "kl/coef/max", "kl/weight/max"):
        assert trainers.log_of(whole, key) == pytest.approx([max(trainers.log_of(each, key))]), key
    assert trainers.log_of(whole, "kl/log_ratio/max") == pytest.approx([max(largest)], rel=1e-4)
    assert trainers.log_of(whole, "kl/log_ratio/mean") == pytest.approx([sum(sums) / sum(tokens)], rel=1e-4)
    steps = [sum(sums[i : i + 2]) / sum(tokens[i : i + 2]) for i in (0, 2, 4)]
    assert trainers.log_of(each, "kl/log_ratio/mean") == pytest.approx(steps, rel=1e-4)


def test_evaluation_regularises_and_logs(model, tmp_path):
    built = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss", per_device_eval_batch_size=8)
    built.eval_dataset = trainers.prompts(4)
    built.evaluate()
    assert trainers.log_of(built, "eval_kl/active") == [1.0]


def test_beta_may_be_set_to_zero_and_back(model, tmp_path):
    from transformers import TrainerCallback

    class Changes(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            built.beta = (0.2, 0.0, 0.4)[state.global_step]

    built = trainers.build(
        GRPOTrainer, GRPOConfig, model, tmp_path, reward=trainers.zero_reward, max_steps=3, kl="k2@loss"
    )
    trainers.shift(built)
    built.add_callback(Changes())
    built.train()
    assert trainers.log_of(built, "kl/beta") == pytest.approx([0.2, 0.0, 0.4])
    gradients = trainers.log_of(built, "grad_norm")
    assert gradients[1] == 0
    assert min(gradients[0], gradients[2]) > 0


def test_schedule_of_beta_scales_the_term(model, tmp_path):
    # From 0: TRL still scores the reference, and the first step has no KL gradient.
    built = trainers.build(
        GRPOTrainer,
        GRPOConfig,
        model,
        tmp_path,
        reward=trainers.zero_reward,
        max_steps=3,
        kl="k2@loss/beta:linear-0-0.4-2",
    )
    trainers.shift(built)
    built.train()
    assert trainers.log_of(built, "kl/beta") == pytest.approx([0.0, 0.2, 0.4])
    gradients = trainers.log_of(built, "grad_norm")
    assert gradients[0] == 0
    assert min(gradients[1:]) > 0
