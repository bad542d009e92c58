"""The measurement of overhead: turns, ratios within rounds, and when it says that the machine is too noisy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.overhead import memory, work
from benchmarks.overhead.measure import MET, MISSED, NO_TARGET, UNDECIDED, Block, in_turns, spread, summary
from benchmarks.overhead.plan import AGAIN, ARMS, HOST, PAIRS, SMOKE, SPEC, Pair, Plan
from benchmarks.overhead.report import plot, table
from kl_plugins import KLSpec
from kl_plugins.spec.observation import Observation


def test_every_arm_takes_every_place_in_the_order() -> None:
    order: list[str] = []

    def run(arm: str) -> Block:
        order.append(arm)
        return Block([1.0], 1, 1)

    found = in_turns(run, 3)
    assert {arm: len(blocks) for arm, blocks in found.items()} == dict.fromkeys(ARMS, 3)
    rounds = [order[start : start + 3] for start in (0, 3, 6)]
    assert all(sorted(one) == sorted(ARMS) for one in rounds)
    assert {one[0] for one in rounds} == set(ARMS)


def blocks(host: list[float], spec: list[float], again: list[float], peaks: tuple[int, int] = (100, 100)) -> dict:
    def of(values: list[float], peak: int) -> list[Block]:
        return [Block([value, value, 50 * value], peak, 10) for value in values]

    return {HOST: of(host, peaks[0]), SPEC: of(spec, peaks[1]), AGAIN: of(again, peaks[0])}


def test_a_slower_machine_falls_out_of_the_ratio() -> None:
    found = summary(blocks([1.0, 2.0, 4.0], [1.005, 2.01, 4.02], [1.0, 2.0, 4.0], (100, 150)), 0.01)
    assert found["ratio"]["median"] == pytest.approx(1.005)
    assert (found["ratio"]["lower"], found["ratio"]["upper"]) == pytest.approx((1.005, 1.005))
    assert found["seconds"][HOST]["median"] == 2.0
    assert found["memory_ratio"]["median"] == 1.5
    assert found["extra"] == pytest.approx({"mean": 0.005, "low": 0.005, "high": 0.005})
    assert found["verdict"] == MET


def test_a_slow_spec_and_a_noisy_machine_show() -> None:
    slow, noisy = blocks([1.0] * 3, [1.05] * 3, [1.0] * 3), blocks([1.0] * 3, [1.0] * 3, [0.9, 1.0, 1.1])
    assert summary(slow, 0.01)["verdict"] == summary(slow, 0.03)["verdict"] == MISSED
    assert summary(slow, 0.06)["verdict"] == MET
    assert summary(slow, None)["verdict"] == NO_TARGET
    assert summary(noisy, 0.01)["verdict"] == UNDECIDED


def test_what_a_step_takes_longer_is_against_both_blocks_of_the_host() -> None:
    found = summary(blocks([1.0, 3.0, 2.0], [2.1, 2.2, 2.3], [3.0, 1.0, 2.0]), 0.01)["extra_seconds"]
    # 0.2 on average; Student's t for two degrees of freedom is 4.303, the standard error 0.1 / sqrt(3).
    assert found == pytest.approx({"mean": 0.2, "low": 0.2 - 0.2484, "high": 0.2 + 0.2484}, abs=1e-4)


def test_quartiles() -> None:
    assert spread([1, 2, 3, 4, 5]) == {"median": 3, "lower": 2, "upper": 4}


def test_a_peak_is_seen() -> None:
    base = memory.restart()
    held = bytearray(60_000_000)
    for index in range(0, len(held), 4096):
        held[index] = 1
    del held
    assert memory.peak() - base > 50_000_000
    memory.restart()
    assert memory.peak() - base < 50_000_000


def test_plans_survive_their_file_and_pairs_are_specs(tmp_path: Path) -> None:
    for host, pairs in PAIRS.items():
        plan = Plan(SMOKE, pairs, 3, 1)
        plan.write(tmp_path / host)
        assert Plan.read(tmp_path / host) == plan
        for pair in pairs:
            spec = Observation.parse(pair.spec).measured if pair.observes else KLSpec.parse(pair.spec)
            assert spec.placement == "loss"
        assert [pair.target for pair in pairs if pair.observes] == [0.01, None]


def test_the_first_blocks_of_a_pair_are_thrown_away(tmp_path: Path) -> None:
    calls: list[bool] = []

    def run(pair: Pair, spec: bool) -> Block:
        calls.append(spec)
        return Block([100.0 if len(calls) <= 2 else 1.0], 1, 1)

    work.measure(Plan(SMOKE, PAIRS["trl"][:1], 3, 1), run, tmp_path / "out.json", "1.0")
    (row,) = json.loads((tmp_path / "out.json").read_text())["pairs"]
    assert [block["seconds"] for blocks in row["blocks"].values() for block in blocks] == [[1.0]] * 9
    assert calls[:2] == [False, True]
    assert sum(calls[2:]) == 3


def test_tokens_fill_the_batch() -> None:
    given = work.tokens(SMOKE, 0)
    lengths = [len(row) for row in given.responses]
    assert len(lengths) == len(given.prompts) == len(given.rewards) == SMOKE.sequences
    assert max(lengths) == SMOKE.response
    assert min(lengths) >= SMOKE.response // 2
    assert given.prompts[0].equal(given.prompts[1])


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    same = blocks([1.0] * 3, [1.0] * 3, [1.0] * 3)
    rows = [{"host": "trl", **vars(pair), **summary(same, pair.target)} for pair in PAIRS["trl"]]
    json.dumps(rows)
    met = [f"{target}%: {MET}" for target in (1, 3)]
    assert list(table(rows).columns[6].cells) == [met[0], met[0], NO_TARGET, met[1], met[1], met[0], NO_TARGET]
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
