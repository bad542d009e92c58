"""``top:`` on real workers: the reference's own pass, in another process, gives what the policy's update needs."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kl_plugins import KLSpec, exact_kl
from kl_plugins.adapters.top_k import KEY, unpacked
from kl_plugins.adapters.verl import require_receipts
from kl_plugins.adapters.verl.metrics import finish
from kl_plugins.adapters.verl.session import require_reference
from kl_plugins.adapters.verl.top_k import ASKED, DRAWS_ASKED
from kl_plugins.patches.verl.trainer import session_of
from kl_plugins.receipts import MissingReceiptError
from tests.support import garbage
from tests.support.verl import remote
from tests.support.verl.main_ppo import KL_TYPE, LOSS, OF_TRAINER, finished, run
from tests.support.verl.ray_support import TRAINERS
from tests.support.verl.reference import by_hand, distance, exact_by_hand
from tests.support.verl.roles import Role, bucketed, by_formula, numbers, scored, shifted, shortened, trainer_of
from tests.support.verl.workers import BETA, Group, make_batch, policy_logits

K = 4
SPEC = f"exact@loss/top:{K}"
ORDER = [3, 0, 6, 1, 7, 2, 5, 4]


@pytest.fixture(scope="module")
def reference(models, cluster):
    made = Role("ref", models[2])
    yield made
    made.end()


@pytest.fixture(scope="module")
def actor(models, assets, cluster):
    settings = {"actor__use_kl_loss": True, "actor__kl_loss_type": SPEC, "actor__optim__lr": 0.0}
    made = Role("actor", str(assets / "model"), **settings)
    require_receipts(made.workers, SPEC)
    yield made
    made.end()


@pytest.fixture(scope="module")
def drawn(models):
    batch = make_batch(models[0])
    del batch.log_probs["rollout_log_probs"]
    return batch


@pytest.fixture(scope="module")
def batch(drawn, reference):
    return scored(drawn, reference.workers, K)


def gradient_of(loss, model):
    model.zero_grad()
    (BETA * loss).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("correction", ["none", "token", "prefix", "sequence"])
def test_the_term_is_set_and_bucket_and_a_weighted_sample(correction, single, batch, models):
    gradient = gradient_of(by_formula(models, batch, K, correction), models[0])
    ours = single.run(f"{SPEC}/is:{correction}", batch)
    assert distance(ours.gradient, gradient) < 1e-4
    assert ours.metrics["kl/exact"] == pytest.approx(bucketed(models, batch, K), rel=1e-4)


def test_two_padded_ranks_are_one_packed_rank(single, pair, batch):
    for text in (f"{SPEC}/is:token", f"exact@loss/horizon:sequence/is:decision/top:{K}"):
        one, both = single.run(text, batch), pair.run(text, batch)
        assert distance(both.gradient, one.gradient) < 2e-5
        assert both.metrics["kl/exact"] == pytest.approx(one.metrics["kl/exact"], rel=1e-4)


def test_the_whole_vocabulary_is_the_exact_kl_without_rejected_tokens(single, drawn, models, reference):
    everything = models[0].config.vocab_size
    masks = [mask.clone() for mask in drawn.masks]
    for mask in masks[::2]:
        mask[1:3] = 0
    whole = scored(drawn, reference.workers, everything)
    sampler = {"rollout_log_probs": whole.log_probs["old_log_probs"]}
    whole = replace(whole, log_probs={**whole.log_probs, **sampler}, extra={**whole.extra, "response_mask": masks})
    text = f"exact@loss/top:{everything}"
    value, gradient, _ = by_hand(models[0], whole, "exact@loss", exact=exact_by_hand(models, whole))
    ours = single.run(text, whole)
    assert ours.metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(ours.gradient, gradient) < 1e-4


@pytest.mark.parametrize("correction", ["none", "token"])
def test_the_gradient_with_draws_is_that_of_the_core(correction, single, drawn, batch, models, reference):
    """From the numbers that the batch carries; it differs from the one without draws."""
    text = f"{SPEC}/draws:6/is:{correction}"
    asked = scored(drawn, reference.workers, K, **{DRAWS_ASKED: 6})
    sampler = {"rollout_log_probs": asked.log_probs["old_log_probs"]}
    asked = replace(asked, log_probs={**asked.log_probs, **sampler})
    values = []
    sides = policy_logits(models[0], asked.prompts, asked.responses), asked.responses, asked.log_probs["ref_log_prob"]
    for row, logits, labels, ref_logp in zip(asked.extra[KEY], *sides, strict=True):
        kept = unpacked(row.view(len(labels), -1), draws=6)
        assert (kept.draws.log_rate < 1e4).any()
        values.append(exact_kl(logits.double(), None, labels, reference=kept, ref_logp=ref_logp))
    exact, remainder = (asked.padded([part[index].float() for part in values]) for index in (0, 3))
    value, gradient, _ = by_hand(models[0], asked, text, exact=exact, remainder=remainder)
    ours = single.run(text, asked)
    assert distance(ours.gradient, gradient) < 1e-4
    assert ours.metrics["kl_loss"] == pytest.approx(value, rel=1e-4)
    assert distance(single.run(f"{SPEC}/is:{correction}", batch).gradient, gradient) > 1e-2


def test_two_padded_ranks_with_draws_are_one_packed_rank(single, pair, drawn, reference):
    asked, text = scored(drawn, reference.workers, K, **{DRAWS_ASKED: 6}), f"{SPEC}/draws:6/is:prefix"
    one, both = single.run(text, asked), pair.run(text, asked)
    assert distance(both.gradient, one.gradient) < 2e-5
    assert both.metrics["kl/exact"] == pytest.approx(one.metrics["kl/exact"], rel=1e-4)


def test_draws_are_the_same_on_every_rank_and_in_every_run(drawn, reference):
    first, second = (scored(drawn, reference.workers, K, **{DRAWS_ASKED: 3}) for _ in range(2))
    for ours, theirs in zip(first.extra[KEY], second.extra[KEY], strict=True):
        assert torch.equal(ours, theirs)


def test_numbers_follow_their_tokens_through_dynamic_batches_and_shuffling(single, drawn, batch, reference, models):
    from verl.utils import tensordict_utils

    dynamic = scored(drawn, reference.workers, K, use_dynamic_bsz=True, max_token_len_per_gpu=24)
    for ours, theirs in zip(numbers(dynamic, K), numbers(batch, K), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    single.use(SPEC)
    single.ask(remote.freeze)
    data = dynamic.tensordict()
    sizes = {"mini_batch_size": 4, "global_batch_size": 4, "epochs": 2, "max_token_len_per_gpu": 24}
    tensordict_utils.assign_non_tensor(data, **sizes, use_dynamic_bsz=True, dataloader_kwargs={"shuffle": True})
    (output,) = single.by_rank(data)
    assert not isinstance(output, str), output
    metrics = tensordict_utils.get(output, "metrics")
    assert finish(metrics, prefix="")
    assert metrics["kl/exact"] == pytest.approx(bucketed(models, batch, K), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "own"),
    [(shifted, r"on this rank by \S+ nats on average"), (shortened, "on this rank there are not as many numbers")],
)
def test_numbers_of_other_tokens_stop_all_ranks(change, own, pair, drawn, reference):
    k = 200  # these tokens were not drawn from a model, so few of them are among its most probable ones
    wide = scored(drawn, reference.workers, k)
    pair.use(f"exact@loss/top:{k}")
    before = pair.ask(remote.weights)[0]
    first, second = pair.by_rank(change(wide, k, row=5).tensordict())
    assert "on 1 ranks the reference's top-k numbers do not belong to the tokens" in first
    assert re.search(own, second)
    after = pair.ask(remote.weights)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_reference_that_computes_in_16_bits_is_not_taken_for_another(single, drawn, reference):
    k = 200
    wide = scored(drawn, reference.workers, k)

    def update(change):
        single.use(f"exact@loss/top:{k}")
        log_probs = {**wide.log_probs, "ref_log_prob": [change(row) for row in wide.log_probs["ref_log_prob"]]}
        (output,) = single.by_rank(replace(wide, log_probs=log_probs).tensordict())
        return output

    assert not isinstance(update(lambda row: row.bfloat16().float()), str)
    assert "do not belong to the tokens" in update(lambda row: row + 0.01)


def test_a_batch_without_the_numbers_stops_all_ranks(pair, drawn):
    pair.use(SPEC)
    for error in pair.by_rank(drawn.tensordict()):
        assert "the pass that computed ref_log_prob gave none" in error


def test_no_model_runs_once_more(single, drawn, reference):
    asked = []
    for k in (None, K):
        reference.ask(remote.count_forwards)
        given = scored(drawn, reference.workers, k)
        asked += reference.ask(remote.counted_forwards)
    trained = []
    for text in ("k2@loss", SPEC):
        single.use(text)
        single.ask(remote.count_forwards)
        single.train(given)
        trained += single.ask(remote.counted_forwards)
    assert asked == [2, 2], "a forward pass for each micro-batch of four sequences"
    assert trained == [1, 1]


def test_a_step_leaves_nothing_to_the_garbage_collector(single, drawn, reference):
    single.use(SPEC)
    single.train(scored(drawn, reference.workers, K))
    for group in (single, reference):
        group.ask(garbage.watch)
    single.train(scored(drawn, reference.workers, K))
    assert [group.ask(garbage.watched) for group in (single, reference)] == [[[]], [[]]]


def test_under_lora_the_policy_without_its_adapter_gives_the_numbers(assets, cluster, models):
    from peft import LoraConfig, get_peft_model

    group = Group(str(assets / "model"), 1, packed=True, lora_rank=8, lora_alpha=16, target_modules="all-linear")

    def under_reference(given):
        return scored(given, group.workers, K, "infer_batch", no_lora_adapter=True)

    group.use(f"{SPEC}/is:token")
    moving = make_batch(models[0], advantages=True)
    quiet = make_batch(models[0])
    for one in (moving, quiet):
        del one.log_probs["rollout_log_probs"]
    group.ask(remote.set_rate, 0.05)
    group.train(under_reference(moving))
    group.ask(remote.record_gradients)
    given = under_reference(quiet)
    weights = group.ask(remote.weights)[0]
    metrics = group.train(given)
    ours = group.ask(remote.recorded_gradients)[0]
    group.end()
    base = type(models[0]).from_pretrained(assets / "model", attn_implementation="sdpa")
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", bias="none")
    policy = get_peft_model(type(base).from_pretrained(assets / "model", attn_implementation="sdpa"), settings)
    policy.load_state_dict(weights)
    assert finish(metrics, prefix="")
    assert metrics["kl/exact"] > 1e-3, "the first update has moved the policy"
    assert distance(ours, gradient_of(by_formula((policy, base), given, K, "token"), policy)) < 1e-4


def test_the_older_trainer_keeps_the_numbers_apart_and_gives_them_to_the_actor_alone(actor, reference, drawn, models):
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = trainer_of(RayPPOTrainer, actor, reference.workers, SPEC)
    notes = {"temperature": 1.0, "global_token_num": [1] * len(drawn.prompts)}
    data = DataProto(batch=drawn.left_and_right().exclude("ref_log_prob"), meta_info=notes)
    data = data.union(trainer._compute_ref_log_prob(data))
    tokens = sum(len(response) for response in drawn.responses)
    assert session_of(trainer).kept.values().numel() == tokens * (2 * K + 1), "no number of padding"
    assert ASKED not in data.meta_info
    assert KEY not in data.batch
    data.reorder(torch.tensor(ORDER))
    metrics = trainer._update_actor(data).meta_info["metrics"]
    assert metrics["kl/exact"] == pytest.approx(bucketed(models, drawn, K), rel=1e-4)
    assert KEY not in data.batch
    assert session_of(trainer).kept is None


@pytest.mark.skipif("v1" not in TRAINERS, reason="veRL without v1 trainers")
def test_in_the_v1_trainer_the_numbers_go_from_worker_to_worker(actor, single, reference, drawn, models):
    import ray
    import transfer_queue
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    transfer_queue.init({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}})
    keys = [f"{row}_0_0" for row in range(len(drawn.prompts))]
    fields = replace(drawn, log_probs={"old_log_probs": drawn.log_probs["old_log_probs"]}).tensordict()
    fields = fields.select(*(key for key, value in fields.items() if isinstance(value, torch.Tensor)))
    tags = [{} for _ in keys]
    transfer_queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    notes = {"temperature": 1.0}
    batch = KVBatchMeta(keys=keys, tags=tags, partition_id="train", extra_info=notes)
    trainer = trainer_of(PPOTrainerSync, actor, reference.workers, SPEC)
    batch, metrics = trainer._compute_ref_log_prob(batch, metrics={}), {}
    assert ASKED not in batch.extra_info
    single.use(None)
    ray.get(single.workers.infer_batch(batch).futures)  # as a critic scores, from the names of rows
    batch.reorder(ORDER)
    trainer._update_actor(batch, metrics=metrics)
    transfer_queue.close()
    assert metrics["kl/exact"] == pytest.approx(bucketed(models, drawn, K), rel=1e-4)


def test_a_reference_without_kl_plugins_is_noticed(stock, actor, reference, drawn):
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    spec = KLSpec.parse(SPEC)
    require_reference(reference.workers, spec, "old")
    with pytest.raises(MissingReceiptError, match=r"rank 0 .*has no hook in this process"):
        require_reference(stock.workers, spec, "old")
    stock.use(None)
    called = SimpleNamespace(compute_ref_log_prob=lambda data: stock.workers.infer_batch(data).get())
    trainer = trainer_of(RayPPOTrainer, actor, called, SPEC)
    data = DataProto(batch=drawn.left_and_right().exclude("ref_log_prob"), meta_info={"temperature": 1.0})
    with pytest.raises(RuntimeError, match="kl-plugins is missing or switched off in the processes of the reference"):
        trainer._compute_ref_log_prob(data)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", TRAINERS)
def test_main_ppo_and_a_resume(version, assets, tmp_path):
    settings = {
        **LOSS,
        **OF_TRAINER[version],
        KL_TYPE: "exact@loss/top/is:token",
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "trainer.save_freq": 2,
    }
    result = run(assets, tmp_path, settings)
    _, second = finished(result)
    assert "costs 58 numbers per token from the reference's pass" in result.output
    assert second["kl/exact"] != 0
    resumed = {**settings, "trainer.resume_mode": "auto", "trainer.total_training_steps": 3}
    (third,) = finished(run(assets, tmp_path, resumed), steps=1)
    assert third["kl/exact"] != 0


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", TRAINERS)
def test_main_ppo_under_lora(version, assets, tmp_path):
    settings = {
        **LOSS,
        **OF_TRAINER[version],
        KL_TYPE: "exact@loss/top",
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "actor_rollout_ref.model.lora_rank": 8,
        "actor_rollout_ref.model.lora_alpha": 16,
        "actor_rollout_ref.model.target_modules": "all-linear",
        "++actor_rollout_ref.model.lora.merge": True,
    }
    _, second = finished(run(assets, tmp_path, settings))
    assert second["kl/exact"] != 0
