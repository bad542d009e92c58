"""``observe:exact@loss/top`` on real workers of veRL: what trains, what is logged, and what a probe compares."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.utils.config import validate_config

from kl_plugins.adapters.top_k import KEY, packed
from kl_plugins.adapters.verl import LOSS_KEY, SCORE_KEY
from kl_plugins.adapters.verl.observe import USE_LOSS, USE_REWARD
from kl_plugins.adapters.verl.top_k import ASKED
from kl_plugins.patches.verl.trainer import session_of
from kl_plugins.reference import reference_top_k
from tests.support.verl import remote
from tests.support.verl.configs import with_settings
from tests.support.verl.main_ppo import KL_TYPE, LOSS, OF_TRAINER, finished, run
from tests.support.verl.ray_support import TRAINERS
from tests.support.verl.roles import shifted, trainer_of
from tests.support.verl.workers import make_batch, policy_logits

K = 4
SPEC = f"exact@loss/top:{K}/is:token"
WORD = "low_var_kl"
OBSERVE = f"{WORD}/observe:{SPEC}"


@pytest.fixture(scope="module")
def drawn(models):
    return recorded(models)


def recorded(models, k=K):
    """A batch that trains, with the reference's numbers as another process would have given them."""
    batch = make_batch(models[0], advantages=True)
    with torch.no_grad():
        logits = policy_logits(models[1], batch.prompts, batch.responses)
    del batch.log_probs["rollout_log_probs"]
    log_probs = [
        one.log_softmax(-1).gather(-1, r[:, None])[:, 0] for one, r in zip(logits, batch.responses, strict=True)
    ]
    numbers = [packed(reference_top_k(one, k)).flatten() for one in logits]
    return replace(batch, log_probs={**batch.log_probs, "ref_log_prob": log_probs}, extra={KEY: numbers})


def two_steps(group, text, batch):
    """The host's own metrics, ours, and the weights after two optimizer steps from the initial ones."""
    group.use(text)
    steps = [group.step(batch) for _ in range(2)]
    ours = [{k: v for k, v in step.metrics.items() if k.startswith("kl/")} for step in steps]
    host = [{k: v for k, v in step.metrics.items() if not k.startswith(("kl/", "perf/"))} for step in steps]
    return host, ours, steps[-1].parameters


@pytest.mark.parametrize("name", ["single", "pair"])
def test_training_is_verls_own_bit_by_bit_and_numbers_are_those_of_the_spec(name, drawn, request):
    group = request.getfixturevalue(name)
    host, _, weights = two_steps(group, WORD, drawn)
    found, ours, after = two_steps(group, f"{OBSERVE}/probe:2", drawn)
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert found == host
    _, applied, _ = two_steps(group, SPEC, drawn)
    assert {key: ours[0][key] for key in applied[0]} == applied[0]
    assert ours[0]["kl/exact"] > 1e-3
    assert ours[0]["kl/observed"] == 1
    probes = [[key for key in one if key.startswith("kl/probe/")] for one in ours]
    assert not probes[0]
    assert "kl/probe/host/cosine" in probes[1]


@pytest.mark.parametrize("name", ["single", "pair"])
def test_a_probe_by_hand(name, drawn, models, request):
    """The vectors of the probe, from gradients of the definition by all logits."""
    group = request.getfixturevalue(name)
    logged = group.run(f"{OBSERVE}/probe:1", drawn).metrics
    vectors = {"own": [], "host": [], "k1": [], "k2": [], "k3": []}
    with torch.no_grad():
        sides = [policy_logits(model, drawn.prompts, drawn.responses) for model in models[:2]]
    for row, response in enumerate(drawn.responses):
        leaf = sides[0][row].double().requires_grad_()
        policy, reference = leaf.log_softmax(-1), sides[1][row].double().log_softmax(-1)
        chosen = reference.topk(K, -1).indices
        p, r = policy.gather(-1, chosen).exp(), reference.gather(-1, chosen).exp()
        tail = ((1 - p.sum(-1)) / (1 - r.sum(-1))).log()
        kl = (p * (p / r).log()).sum(-1) + (1 - p.sum(-1)) * tail
        logp, ref = (side.gather(-1, response[:, None])[:, 0] for side in (policy, reference))
        u = (logp - ref).detach()
        remainder = torch.where((chosen == response[:, None]).any(-1), 0.0, u - tail.detach())
        weight = (logp - drawn.log_probs["old_log_probs"][row].double()).detach().exp()
        host = core_algos.kl_penalty(logp, ref, WORD)  # with veRL's clamps
        terms = {"own": kl + weight * remainder * logp, "host": host, "k1": logp, "k2": u * logp}
        terms["k3"] = (1 - u.neg().exp()) * logp
        for key, term in terms.items():
            (gradient,) = torch.autograd.grad(term.sum(), leaf, retain_graph=True)
            kept = gradient.gather(-1, chosen)
            vectors[key].append(torch.cat([kept, gradient.sum(-1, True) - kept.sum(-1, True)], -1).flatten())
    own, *others = (torch.cat(parts) for parts in vectors.values())
    for key, other in zip(("host", "k1", "k2", "k3"), others, strict=True):
        cosine, ratio = (own @ other) / own.norm() / other.norm(), other.norm() / own.norm()
        assert logged[f"kl/probe/{key}/cosine"] == pytest.approx(cosine.item(), rel=1e-3, abs=1e-4), key
        assert logged[f"kl/probe/{key}/norm_ratio"] == pytest.approx(ratio.item(), rel=1e-3), key


def without_numbers(batch, k, row):
    return replace(batch, extra={})


@pytest.mark.parametrize("change", [shifted, without_numbers])
def test_numbers_of_no_use_are_left_out_and_do_not_stop_the_run(change, single, models):
    k = 200  # these tokens were not drawn from a model, so few of them are among its most probable ones
    wide, text = recorded(models, k), f"{WORD}/observe:exact@loss/top:{k}/probe:1"
    host, _, weights = two_steps(single, WORD, wide)
    found, ours, after = two_steps(single, text, change(wide, k, row=5))
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert host[0]["kl_loss"] == found[0]["kl_loss"]
    assert [one["kl/observed"] for one in ours] == [0.0, 0.0]


def test_no_model_runs_once_more(single, drawn):
    counts = []
    for text in (WORD, f"{OBSERVE}/probe:1"):
        single.use(text)
        single.ask(remote.count_forwards)
        single.train(drawn)
        counts += single.ask(remote.counted_forwards)
    assert counts == [1, 1]


def test_the_trainer_asks_the_references_pass_for_the_numbers(single, drawn):
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    single.use(WORD)
    called = SimpleNamespace(compute_ref_log_prob=lambda data: single.workers.infer_batch(data).get())
    trainer = trainer_of(RayPPOTrainer, SimpleNamespace(config=with_settings({}), workers=None), called, OBSERVE)
    data = DataProto(
        batch=drawn.left_and_right().exclude("ref_log_prob", KEY),
        meta_info={"temperature": 1.0, "global_token_num": [1] * len(drawn.prompts)},
    )
    result = trainer._compute_ref_log_prob(data)
    tokens = sum(len(response) for response in drawn.responses)
    assert session_of(trainer).kept.values().numel() == tokens * (2 * K + 1)
    assert ASKED not in data.meta_info
    assert KEY not in result.batch
    called.compute_ref_log_prob = lambda data: single.workers.infer_batch(_silent(data)).get()
    session_of(trainer).kept = None
    again = trainer._compute_ref_log_prob(data)  # a reference without kl-plugins
    assert torch.equal(again.batch["ref_log_prob"], result.batch["ref_log_prob"])
    assert session_of(trainer).kept is None


def _silent(data):
    from verl.utils import tensordict_utils

    tensordict_utils.pop(data, ASKED)
    return data


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {SCORE_KEY: "kl/observe:exact@loss/top", USE_REWARD: True},
            "the policy's logits, which veRL's trainer process",
        ),
        ({LOSS_KEY: "observe:exact@loss"}, "did you mean: observe:exact@loss/top"),
        (
            {LOSS_KEY: "observe:exact@loss/top", "actor_rollout_ref.model.use_fused_kernels": True},
            "use_fused_kernels=True computes log-probs in a kernel that never holds the logits",
        ),
        (
            {LOSS_KEY: "observe:exact@loss/top", "actor_rollout_ref.ref.strategy": "megatron"},
            "ref.strategy=megatron, which has to show its logits under top:",
        ),
    ],
)
def test_refusals(settings, says):
    with pytest.raises((ValueError, RuntimeError), match=says):
        validate_config(with_settings({USE_LOSS: True, **settings}), use_reference_policy=True, use_critic=False)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", TRAINERS)
def test_a_whole_run(version, assets, tmp_path):
    settings = {
        **LOSS,
        **OF_TRAINER[version],
        KL_TYPE: "low_var_kl/observe:exact@loss/top/is:token/probe:2",
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "trainer.total_training_steps": 1,
    }
    result = run(assets, tmp_path, settings, environment={"SAMPLER_SHARPNESS": "0.8"})
    (step,) = finished(result, steps=1)
    assert "observes, changes nothing, in veRL" in result.output
    assert "costs 58 numbers per token from the reference's pass" in result.output
    assert step["kl/observed"] == 1
    assert step["kl/exact"] != 0
    assert 0 < step["kl/probe/k2/cosine"] < 1
    assert step["kl/probe/host/norm_ratio"] > 0
