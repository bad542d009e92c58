"""The benchmark of the search for the most probable tokens, at its smallest size."""

import json

from benchmarks import top_tokens


def test_it_runs(tmp_path):
    top_tokens.main(out=tmp_path, k=4, rounds=3, dtype="bfloat16", device="cpu", threads=1, smoke=True)
    found = json.loads((tmp_path / "top_tokens.json").read_text())
    (row,) = found["rows"]
    assert {name: len(times) for name, times in row["ms"].items()} == {"torch.topk": 3, "top_tokens": 3}
    assert row["ratio"]["lower"] <= row["ratio"]["median"] <= row["ratio"]["upper"]
    assert (tmp_path / "top_tokens.png").stat().st_size > 0
