"""Ranks that share sequences (Ulysses), under sampled specs and exact ones; log-probs from a kernel without logits."""

import re
import shutil

import pytest
import ray
import torch

from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.verl.top_k import ASKED, DRAWS_ASKED
from kl_plugins.metrics import REDUCTIONS
from tests.support.verl import remote
from tests.support.verl.main_ppo import KL_TYPE, LOSS, OF_TRAINER, finished, run
from tests.support.verl.ray_support import TRAINERS
from tests.support.verl.reference import by_hand, distance, exact_by_hand
from tests.support.verl.roles import bucketed
from tests.support.verl.workers import Group, make_batch, policy_log_probs, with_scores, without_last_token

FUSED = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}
SPECS = (
    "k2@loss/is:token/floor:0.99",
    "k3@loss/is:token/cap:1.2/behaviour:old",
    "k2@loss/horizon:sequence/is:decision",
)
SAMPLED = REDUCTIONS.keys() - {"kl/exact"}


@pytest.fixture(scope="module")
def batch(model):
    # Two ranks cannot share these tokens equally, so veRL pads.
    return without_last_token(make_batch(model), row=2)


@pytest.fixture(scope="module")
def sharing(assets, cluster):
    """Two ranks that share every sequence."""
    made = Group(str(assets / "model"), 2, packed=True, sequence_parallel=2)
    yield made
    made.end()


@pytest.fixture(scope="module")
def tied(assets, tmp_path_factory):
    """A model whose head is its embedding, and its folder.

    Under FSDP2 veRL's own fused forward fails on other models: it reads the weight of a head that it has sharded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(assets / "model", folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True, attn_implementation="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        made.lm_head.weight.mul_(10)
    made.save_pretrained(folder)
    return made, str(folder)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.full)])
def fused(request, tied, cluster):
    """Ranks whose model returns log-probs and no logits: one, or two that share every sequence."""
    made = Group(tied[1], request.param, packed=True, sequence_parallel=request.param, **FUSED)
    yield made
    made.end()


def scored(group, batch):
    """The log-probs that the trainer gets, from which specs in reward and advantage are computed."""
    from verl.utils import tensordict_utils

    data = batch.tensordict()
    tensordict_utils.assign_non_tensor(data, compute_loss=False)
    rows = zip(group.workers.infer_batch(data).get()["log_probs"].unbind(), batch.prompts, strict=True)
    return torch.cat([row[len(prompt) - 1 : -1] for row, prompt in rows])


def by_model(model, batch):
    with torch.no_grad():
        return torch.cat(policy_log_probs(model, batch.prompts, batch.responses))


@pytest.mark.parametrize("text", SPECS)
def test_a_step_of_two_ranks_that_share_sequences_is_that_of_one(text, sharing, single, batch):
    both, one = sharing.run(text, batch), single.run(text, batch)
    assert distance(both.gradient, one.gradient) < 2e-5
    for key in {*SAMPLED, "kl/beta", "kl_loss"}:
        assert both.metrics[key] == pytest.approx(one.metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.full
def test_two_pairs_that_share_sequences_are_one_rank(assets, cluster, single, batch):
    pairs = Group(str(assets / "model"), 4, packed=True, sequence_parallel=2)
    for text in SPECS:
        four, one = pairs.run(text, batch), single.run(text, batch)
        assert distance(four.gradient, one.gradient) < 2e-5
        for key in SAMPLED:
            assert four.metrics[key] == pytest.approx(one.metrics[key], rel=1e-4, abs=1e-6), key
    pairs.use("k2@loss/beta:linear-0.5-0-10")
    ray.get(pairs.workers.workers[3].__ray_call__.remote(remote.set_coefficient, 0.25))
    assert all("was changed" in error for error in pairs.by_rank(batch.tensordict()))
    pairs.end()


def test_log_probs_of_shared_sequences_are_those_of_the_model(sharing, batch, model):
    sharing.use(None)
    assert torch.allclose(scored(sharing, batch), by_model(model, batch), atol=1e-4)


def test_fused_log_probs_train_as_those_from_logits(fused, tied):
    batch = without_last_token(make_batch(tied[0]), row=2)
    for text in SPECS:
        value, gradient, found = by_hand(tied[0], batch, text)
        ours = fused.run(text, batch)
        assert ours.metrics["kl_loss"] == pytest.approx(value, rel=1e-4)
        assert distance(ours.gradient, gradient) < 2e-5
        for key, number in found.items():
            assert ours.metrics[key] == pytest.approx(number.item(), rel=1e-3, abs=1e-6), key
    fused.use(None)
    assert torch.allclose(scored(fused, batch), by_model(tied[0], batch), atol=1e-4)
    fused.use("exact@loss/top:4")
    batch.extra[KEY] = [torch.zeros(9 * len(response)) for response in batch.responses]
    assert all("veRL's engine never showed its logits" in error for error in fused.by_rank(batch.tensordict()))


@pytest.fixture(scope="module")
def with_reference(sharing, models):
    sharing.ask(remote.add_reference, models[2])
    return sharing


@pytest.mark.parametrize("text", ["exact@loss/is:prefix", "k2@loss/horizon:sequence/future:exact/is:sequence"])
def test_exact_terms_of_shared_sequences_are_those_of_the_full_softmax(text, with_reference, batch, models):
    value, gradient, found = by_hand(models[0], batch, text, exact=exact_by_hand(models, batch))
    ours = with_reference.run(text, batch)
    assert ours.metrics["kl_loss"] == pytest.approx(value, rel=1e-4)
    assert ours.metrics["kl/exact"] == pytest.approx(found["kl/exact"].item(), rel=1e-4)
    assert distance(ours.gradient, gradient) < 1e-4


def test_the_references_most_probable_tokens_come_from_all_ranks_of_a_sequence(with_reference, single, batch, models):
    from verl.utils import tensordict_utils

    def asked(**notes):
        data = batch.tensordict()
        tensordict_utils.assign_non_tensor(data, compute_loss=False, **notes)
        output, other = with_reference.ask(remote.score, data)
        assert other is None
        return with_scores(batch, output)

    given = asked(**{ASKED: 4})
    for text in ("exact@loss/top:4/is:token", "exact@loss/horizon:sequence/is:decision/top:4"):
        both, one = with_reference.run(text, given), single.run(text, given)
        assert both.metrics["kl/exact"] == pytest.approx(bucketed(models, batch, 4), rel=1e-4)
        assert both.metrics["kl_loss"] == pytest.approx(one.metrics["kl_loss"], rel=1e-4)
        assert distance(both.gradient, one.gradient) < 2e-5
    given, text = asked(**{ASKED: 4, DRAWS_ASKED: 5}), "exact@loss/top:4/draws:5/is:token"
    both, one = with_reference.run(text, given), single.run(text, given)
    assert both.metrics["kl/exact"] == pytest.approx(one.metrics["kl/exact"], rel=1e-4)
    assert both.metrics["kl/exact"] != pytest.approx(bucketed(models, batch, 4), rel=1e-2)
    assert distance(both.gradient, one.gradient) < 2e-5


def test_without_flash_attention_ranks_that_share_a_sequence_do_not_see_it_whole(sharing, batch, model):
    """This is why kl-plugins refuses it; veRL does not."""
    sharing.use(None)
    sharing.ask(remote.attend, "sdpa")
    assert (scored(sharing, batch) - by_model(model, batch)).abs().mean() > 0.01


def test_a_controller_counts_shared_sequences_once(sharing, single, batch):
    betas = []
    for group in (sharing, single):
        group.use("k2@loss/beta:adaptive-0.1-10")
        betas.append([group.step(batch).metrics["kl/beta"] for _ in range(2)])
    assert betas[0] == pytest.approx(betas[1], rel=1e-5)
    assert betas[0][1] != betas[0][0]


def test_a_coefficient_changed_on_one_rank_stops_the_rank_that_shares_its_sequences(sharing, batch):
    sharing.use("k2@loss/beta:linear-0.5-0-10")
    ray.get(sharing.workers.workers[1].__ray_call__.remote(remote.set_coefficient, 0.25))
    unchanged, changed = sharing.by_rank(batch.tensordict())
    assert "kl_loss_coef was changed during the run on 1 ranks" in unchanged
    assert "kl_loss_coef was changed from 0.5 to 0.25" in changed


def test_a_broken_log_prob_of_one_rank_is_counted_once_on_both(sharing, batch):
    sharing.use(SPECS[0])
    before = sharing.ask(remote.weights)[0]
    # The first micro-batch has two sequences of nine tokens, and this rank the second; its prompt has five.
    sharing.ask(remote.break_policy, 1, 4, 0, float("nan"))
    errors = sharing.by_rank(batch.tensordict())
    tokens = sum(len(response) for response in batch.responses)
    assert [re.search(r"policy on (\d+) of (\d+) response tokens", error).groups() for error in errors] == [
        ("1", str(tokens))
    ] * 2
    after = sharing.ask(remote.weights)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", TRAINERS)
@pytest.mark.parametrize("text", ["k2@loss/is:token", "exact@loss/top/is:token", "exact@loss"])
def test_main_ppo_on_two_ranks_that_share_sequences(text, version, assets, tmp_path):
    settings = {
        **LOSS,
        **OF_TRAINER[version],
        KL_TYPE: text,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": "k1@advantage",
        "algorithm.kl_ctrl.kl_coef": 0.1,
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2,
        "actor_rollout_ref.model.use_remove_padding": True,
        "+actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2",
    }
    result = run(assets, tmp_path, settings, ranks=2)
    for step in finished(result):
        # The sampler is a whole model on one rank: its log-probs are those of the policy that generated.
        assert step["training/rollout_probs_diff_max"] < 1e-4
    assert {"0", "1"} <= set(re.findall(r"rank (\d) of 2 \(pid", result.output))


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", TRAINERS)
def test_main_ppo_with_fused_kernels(version, assets, tied, tmp_path):
    settings = {
        **LOSS,
        **OF_TRAINER[version],
        KL_TYPE: "k2@loss/is:token",
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "actor_rollout_ref.model.path": tied[1],
        "actor_rollout_ref.model.use_fused_kernels": True,
        "actor_rollout_ref.model.use_remove_padding": True,
    }
    for step in finished(run(assets, tmp_path, settings)):
        assert step["training/rollout_probs_diff_max"] < 1e-4
