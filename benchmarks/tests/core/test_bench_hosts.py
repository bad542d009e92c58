"""The comparison of hosts: its reference against autograd, its normalisations by hand, and whether it sees mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.hosts import compare, report
from benchmarks.hosts.cases import BETA, HOSTS, SPECS, Case, cases
from benchmarks.hosts.records import Record, load, save
from benchmarks.hosts.reference import Oracle, reward_site, sequence_weights
from benchmarks.tests.core.host_fixture import LENGTHS, MICRO_BATCHES, VOCABULARY, Policy, case_of, oracle_of, record_of
from kl_plugins import KLSpec, kl_penalty, kl_term


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.fixture(scope="module")
def oracle(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle_of(policy, tmp_path_factory.mktemp("fixture"))


@pytest.mark.parametrize("text", [*SPECS, "k2@loss/is:token/behaviour:sampler/norm"])
@pytest.mark.parametrize(
    ("host", "aggregation"), [("trl", "dapo"), ("verl", "seq-mean-token-mean"), ("openrlhf", "token-mean")]
)
def test_the_references_gradient_is_autograds(
    text: str, host: str, aggregation: str, policy: Policy, oracle: Oracle
) -> None:
    spec, mask = KLSpec.parse(text), oracle.mask
    flat = policy.taken(policy.log_softmax())
    logp = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat)
    exact = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, policy.exact())
    old, reference = oracle.log_probs["model"], oracle.log_probs["near"]
    if spec.placement == "loss":
        behaviour = {"old_logp": old, "sampler_logp": oracle.sampler}
        per_token = kl_term(spec, logp, reference, mask, **behaviour, exact=exact if spec.needs_exact else None).loss
    else:
        penalty = kl_penalty(spec, old, reference, mask)
        if spec.placement == "reward":
            penalty = reward_site(host, penalty, mask, 2)
        per_token = (logp - old).exp() * penalty * mask  # minus the host's surrogate with advantage -penalty
    if aggregation == "seq-mean-token-mean":
        value = (per_token.sum(-1) / mask.sum(-1)).mean()
    else:
        value = per_token.sum() / mask.sum()
    gradients = torch.autograd.grad(BETA * value, policy.parameters, retain_graph=True)
    found = oracle.expected(host, case_of(text, aggregation=aggregation))
    assert compare.relative(found.gradient, torch.cat([g.flatten() for g in gradients])) < 1e-12
    if spec.placement == "loss":
        assert found.loss == pytest.approx(value.item(), rel=1e-12)


def test_normalisations_by_hand() -> None:
    def weights(host: str, mode: str) -> list[float]:
        return sequence_weights(host, mode, [1, 3], 4, [[0], [1]])

    assert (
        weights("trl", "dapo") == weights("verl", "token-mean") == weights("openrlhf", "token-mean") == [1 / 4, 1 / 4]
    )
    assert weights("trl", "grpo") == weights("verl", "seq-mean-token-mean") == [1 / 2, 1 / 6]
    assert weights("trl", "bnpo") == [1 / 2, 1 / 6]
    assert weights("trl", "dr_grpo") == [1 / 8, 1 / 8]
    assert weights("trl", "luspo") == weights("verl", "seq-mean-token-sum") == [1 / 2, 1 / 2]
    assert weights("verl", "seq-mean-token-sum-norm") == [1 / 2, 1 / 6]
    with pytest.raises(ValueError, match="openrlhf has no aggregation 'dapo'"):
        weights("openrlhf", "dapo")


def test_reward_sites_by_hand() -> None:
    penalty, mask = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    assert reward_site("trl", penalty, mask, 2).tolist() == [[-0.5, -0.5], [0.5, 0.0]]
    assert torch.equal(reward_site("verl", penalty, mask, 2), reward_site("trl", penalty, mask, 2))
    assert reward_site("openrlhf", penalty, mask, 2).tolist() == [[3.0, 2.0], [4.0, 0.0]]


@pytest.mark.parametrize("host", HOSTS)
def test_a_flawless_host_is_within_the_target(host: str, oracle: Oracle) -> None:
    aggregation = {"trl": "dapo"}.get(host, "token-mean")
    records = [record_of(oracle, host, case_of(text, aggregation=aggregation)) for text in SPECS]
    rows = compare.parity(oracle, {host: records})
    assert len(rows) == len(SPECS)
    assert max(report.worst(row) for row in rows) < 1e-6


def test_a_wrong_gradient_shows(oracle: Oracle) -> None:
    case = case_of("k2@loss/is:token/behaviour:sampler")
    for wrong in ("k2@loss", "k3@loss/is:token/behaviour:sampler", "k2@loss/is:token/behaviour:old"):
        row = compare.parity_row(oracle, "trl", record_of(oracle, "trl", case, wrong))
        assert row["gradient"] > 1e-2
        assert row["coefficient"] > 1e-2


def test_a_wrong_normalisation_shows(oracle: Oracle) -> None:
    halved = record_of(oracle, "trl", case_of("k2@loss"), factor=0.5)
    row = compare.parity_row(oracle, "trl", halved)
    assert (row["gradient"], row["coefficient"], row["loss"]) == pytest.approx((0.5, 0.5, 0.5), rel=1e-6)
    otherwise = record_of(oracle, "trl", case_of("k2@loss", aggregation="grpo"))
    mislabelled = Record(**{**vars(otherwise), "case": case_of("k2@loss")})
    assert compare.parity_row(oracle, "trl", mislabelled)["gradient"] > 1e-2
    rows = compare.portable_beta(
        oracle, {"trl": [halved, record_of(oracle, "trl", case_of("k2@loss", aggregation="luspo"))]}
    )
    assert [row["scale"] for row in rows] == pytest.approx([2.0, len(LENGTHS) / sum(LENGTHS)], rel=1e-6)
    assert [row["documented"] for row in rows] == pytest.approx([1.0, len(LENGTHS) / sum(LENGTHS)], rel=1e-6)
    assert rows[1]["rest"] < 1e-6


def test_a_lost_parameter_is_an_error(oracle: Oracle) -> None:
    record = record_of(oracle, "trl", case_of("k2@loss"))
    del record.gradient["own"]
    with pytest.raises(ValueError, match=r"differ from the fixture's: \['own'\]"):
        compare.parity_row(oracle, "trl", record)


def test_a_native_setting_is_named_and_dead_tokens_are_counted(oracle: Oracle) -> None:
    native = Case("low_var_kl (near)", "", {"estimator": "low_var_kl"}, "loss", "near", "token-mean")
    whole = record_of(oracle, "verl", case_of("k3@loss", aggregation="token-mean"))
    row = compare.native_row(oracle, "verl", Record(**{**vars(whole), "case": native}))
    assert (row["nearest"], row["equal"], row["dead_tokens"]) == ("k3@loss", True, 0)
    assert row["applied"] == pytest.approx(row["logged"])
    pull = whole.pull.clone()
    pull[0, 0] = 0
    weights = oracle.weights("verl", "token-mean")
    flat = oracle.gradient(pull.double() / (BETA * weights), weights).float()
    clamped = {"shared": flat[:VOCABULARY], "own": flat[VOCABULARY:].view(-1, VOCABULARY)}
    row = compare.native_row(
        oracle, "verl", Record(**{**vars(whole), "case": native, "pull": pull, "gradient": clamped})
    )
    assert (row["equal"], row["dead_tokens"]) == (False, 1)
    assert row["distance"] > 1e-3


def test_a_far_setting_is_held_against_what_it_is_nearby(oracle: Oracle) -> None:
    settings = {scenario: Case(f"k2 ({scenario})", "", {}, "loss", scenario, "dapo") for scenario in ("near", "far")}
    records = []
    for scenario, case in settings.items():
        spec = Case("k2@loss", "k2@loss", {}, "loss", scenario, "dapo")
        factor = 1.0 if scenario == "near" else 0.25
        records.append(Record(**{**vars(record_of(oracle, "trl", spec, factor=factor)), "case": case}))
    near, far = compare.native(oracle, {"trl": records})
    assert (near["nearest"], near["equal"], far["nearest"], far["equal"]) == ("k2@loss", True, "k2@loss", False)
    assert far["distance"] == pytest.approx(0.75, rel=1e-6)


def test_records_survive_their_file(oracle: Oracle, tmp_path: Path) -> None:
    record = record_of(oracle, "trl", case_of("k2@loss"))
    save(tmp_path / "trl.pt", "trl", "1.0", [record])
    host, version, (found,) = load(tmp_path / "trl.pt")
    assert (host, version, found.case, found.micro_batches) == ("trl", "1.0", record.case, MICRO_BATCHES)
    assert torch.equal(found.pull, record.pull)


def test_a_watched_micro_batch_lands_in_the_fixtures_order() -> None:
    responses = [[5, 6, 7], [8, 9]]
    record = Record.empty(case_of("k2@loss"), [3, 2])
    tokens = torch.tensor([[8, 9, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logp = torch.zeros(2, 3, requires_grad=True)
    factors = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]])
    live = logp + 1
    record.see(responses.index, tokens, mask, live)
    (live * factors).sum().backward()
    assert record.pull.tolist() == [[3.0, 4.0, 5.0], [1.0, 2.0, 0.0]]
    assert record.log_probs.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert record.micro_batches == [[1, 0]]


@pytest.mark.parametrize("host", HOSTS)
def test_case_names_are_unique_and_smoke_is_a_part(host: str) -> None:
    names = [case.name for case in cases(host)]
    assert len(names) == len(set(names))
    assert {case.name for case in cases(host, smoke=True)} <= set(names)
    for case in cases(host):
        assert not case.spec or KLSpec.parse(case.spec).placement == case.placement


def test_what_processes_saw_is_put_together() -> None:
    def seen(tokens: list[int], pull: float) -> dict[str, object]:
        mask = torch.tensor([[False, *(True for _ in tokens)]])
        padded = torch.full((1, len(tokens) + 1), 99.0)
        padded[mask] = pull
        return {"responses": [tokens], "mask": mask, "log_probs": padded, "pull": padded}

    record = Record.empty(case_of("k2@loss"), [3, 2])
    record.take([[5, 6, 7], [8, 9]].index, [([seen([8, 9], 4.0)], [1.0]), ([seen([5, 6, 7], 2.0)], [3.0])])
    assert record.pull.tolist() == [[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]
    assert record.log_probs.tolist() == [[2.0, 2.0, 2.0], [4.0, 4.0, 0.0]]
    assert (record.loss, record.micro_batches) == (2.0, [[1], [0]])
