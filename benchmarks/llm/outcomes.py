"""The outcomes of the staleness runs, by rules that were fixed before any run.

A policy is *held* if its exact KL, averaged over the last three measurements, is at most half of the KL without a KL
term at the same delay and seed. It *ran away* if its KL is at least as large as without a KL term, or if its reward
ends below that of the model before training. All other outcomes are *loose*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from .settings import NONE

LAST = 3  # number of measurements that are averaged
HELD = 0.5  # share of the KL without a KL term
AWAY = 1.0
RAN_AWAY, LOOSE, HELD_WORD = "ran away", "loose", "held"
Records = Mapping[tuple[str, int, int], Mapping[str, Any]]  # by arm, delay and seed


def end(record: Mapping[str, Any]) -> dict[str, float]:
    """Return averages over the last measurements, the highest KL, and the final and the worst importance weights."""
    last = record["curve"][-LAST:]
    found = {name: mean(p[name] for p in last) for name in ("reward", "kl", "entropy", "tokens")}
    found["kl_highest"] = max(p["kl"] for p in record["curve"])
    logged = [p["train/kl/floor_frac"] for p in last if "train/kl/floor_frac" in p]
    if logged:
        found["floor_frac"] = mean(logged)
    weights = record["weights"]
    if weights:
        found["ess"] = mean(w["ess"] for w in weights[-LAST:])
        found["ess_lowest"] = min(w["ess"] for w in weights)
        found["weight_max"] = max(w["weight_max"] for w in weights)
    return found


def outcome(records: Records, arm: str, delay: int, seed: int) -> str:
    """Return one of the three words, or an empty text if a run is missing."""
    own, free = records.get((arm, delay, seed)), records.get((NONE, delay, seed))
    if own is None or free is None or arm == NONE:
        return ""
    found, without = end(own), end(free)
    if found["kl"] >= AWAY * without["kl"] or found["reward"] < own["curve"][0]["reward"]:
        return RAN_AWAY
    return HELD_WORD if found["kl"] <= HELD * without["kl"] else LOOSE


def statement(records: Records, arm: str, delays: Sequence[int]) -> str:
    """Return one sentence that says whether an arm ran away at any delay."""
    found = {key[1:]: outcome(records, arm, *key[1:]) for key in records if key[0] == arm and key[1] in delays}
    judged = {key: word for key, word in found.items() if word}
    if not judged:
        return f"`{arm}`: no run to judge."
    away = sorted(key for key, word in judged.items() if word == RAN_AWAY)
    counts = ", ".join(f"{list(judged.values()).count(word)} {word}" for word in (HELD_WORD, LOOSE, RAN_AWAY))
    where = "; ran away at " + ", ".join(f"delay {d} seed {s}" for d, s in away) if away else ""
    seen = ", ".join(str(d) for d in sorted({d for d, _ in judged}))
    return f"`{arm}` at delays {seen}: {counts}{where}."
