"""The language model's runs without a framework: a file in parts, rewards, outcomes, the demonstration's words."""

import json

import pytest

from benchmarks.llm import demo_report, outcomes, parts, tasks
from benchmarks.llm.settings import NONE, slug


def test_parts_join_to_the_file_they_were_cut_from(tmp_path):
    file = tmp_path / "model.whl"
    file.write_bytes(bytes(range(256)) * 41)
    made = parts.split(file, tmp_path / "cut", 4096)
    assert [folder.name for folder in made] == ["1", "2", "3"]
    assert all(part.stat().st_size <= 4096 for part in (tmp_path / "cut").rglob("*.part*"))
    joined = parts.join(tmp_path / "cut", tmp_path / "joined")
    assert joined.read_bytes() == file.read_bytes()
    before = joined.stat().st_mtime_ns
    assert parts.join(tmp_path / "cut" / "1", tmp_path / "joined") == joined  # it is there: one part's list is enough
    assert joined.stat().st_mtime_ns == before


def test_parts_that_do_not_make_the_file_are_refused(tmp_path):
    file = tmp_path / "model.whl"
    file.write_bytes(b"weights" * 1000)
    parts.split(file, tmp_path / "cut", 3000)
    part = tmp_path / "cut" / "2" / "model.whl.part2"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(parts.PartsError, match="another checksum"):
        parts.join(tmp_path / "cut", tmp_path / "joined")
    assert not list((tmp_path / "joined").iterdir())
    part.unlink()
    with pytest.raises(parts.PartsError, match=r"of 3 parts of model.whl, 2 are not below"):
        parts.join(tmp_path / "cut", tmp_path / "joined")
    with pytest.raises(parts.PartsError, match="no parts below"):
        parts.join(tmp_path / "joined", tmp_path / "other")


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("Sandy shores shine so softly, sailors say.", 1.0 * 7 / 8),
        ("She sells sea shells by the sea shore today.", 6 / 9),
        ("S", 1 / 8),
        ("", 0.0),
        ("It's sad.", 1 / 8),
    ],
)
def test_alliteration_is_a_share_of_the_words_of_a_whole_sentence(answer, reward):
    assert tasks.alliteration("?", answer) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("7 + 5 = 12.", 1.0), ("The answer is 12", 1.0), ("12 or 13", 0.0), ("twelve", 0.0), ("9" * 5000, 0.0)],
)
def test_a_sum_is_right_where_the_last_number_is(answer, reward):
    assert tasks.right_sum("What is 7 + 5?", answer) == reward


def test_questions_differ_and_some_are_held_out():
    for task in tasks.TASKS.values():
        assert len(set(task.questions)) == len(task.questions) >= 4 * tasks.HELD_OUT


def record(kl, reward=0.5, start=0.2):
    points = [{"step": n, "reward": r, "kl": k, "entropy": 9.0, "tokens": 20.0}
              for n, (r, k) in enumerate([(start, 0.0)] + [(reward, kl)] * 3)]  # fmt: skip
    return {"curve": points, "weights": []}


@pytest.mark.parametrize(
    ("own", "word"),
    [
        (record(4.0), outcomes.HELD_WORD),
        (record(7.0), outcomes.LOOSE),
        (record(12.0), outcomes.RAN_AWAY),
        (record(1.0, reward=0.1), outcomes.RAN_AWAY),
    ],
)
def test_outcome_of_a_run_beside_the_one_without_kl(own, word):
    records = {(NONE, 4, 1): record(10.0), ("default", 4, 1): own}
    assert outcomes.outcome(records, "default", 4, 1) == word
    text = outcomes.statement(records, "default", [4])
    assert f"1 {word}" in text
    assert ("delay 4 seed 1" in text) == (word == outcomes.RAN_AWAY)


def test_without_the_run_without_kl_nothing_is_said():
    records = {("default", 4, 1): record(4.0)}
    assert outcomes.outcome(records, "default", 4, 1) == ""
    assert "no run to judge" in outcomes.statement(records, "default", [4])


def test_table_of_the_demonstration_says_what_it_is():
    shown = [{"question": "Why?", "answer": "So\nit is", "reward": 0.5}]
    point = {"step": 0, "reward": 0.2, "kl": 0.0, "entropy": 40.0, "tokens": 24.0, "sampled": 64}
    arm = {"curve": [point, {**point, "step": 45, "kl": 3.0}], "before": shown, "after": shown, "step_seconds": 9.9}
    text = demo_report.text({
        "settings": {"model": "m", "prompts": 4, "generations": 4, "tokens": 24, "learning_rate": 5e-5, "beta": 0.1},
        "versions": {"trl": "1.16.0"}, "machine": {"gpu": None, "processor": "P", "cores": 2}, "workers": 1,
        "task": {"reward": "share of right answers"}, "arms": {"none": arm, "default": arm},
    })  # fmt: skip
    assert "a demonstration, not evidence" in text
    assert "-0.100" in text  # 0.2 - 0.1 * 3
    assert text.count("So it is") == 3
    assert max(map(len, text.splitlines())) <= demo_report.WIDTH
    json.dumps(text)


def test_names_of_files_are_plain():
    assert slug("k2@loss/is:token/floor:0.5") == "k2-loss-is-token-floor-0.5"
