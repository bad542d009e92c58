"""The pairs of a host's own KL and a spec that are compared, and the sizes of the model and the batch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kl_plugins.spec.observation import looks_like_observation

HOST, SPEC, AGAIN = "host", "spec", "host again"
ARMS = (HOST, SPEC, AGAIN)
"""The host's own KL is measured twice. The difference between the two is the machine's noise."""


@dataclass(frozen=True)
class Size:
    """The sizes of model and batch.

    Attributes:
        hidden, layers, vocabulary: sizes of a Qwen2 model.
        prompt, response: numbers of tokens; a response has between half of ``response`` and ``response`` tokens.
        sequences: number of sequences per optimizer step; a multiple of 4.
    """

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 8192
    prompt: int = 32
    response: int = 224
    sequences: int = 8


SMOKE = Size(hidden=64, layers=2, vocabulary=512, prompt=4, response=16)


@dataclass(frozen=True)
class Pair:
    """A host's own KL and a spec, or the host's own KL without and with ``observe``.

    Attributes:
        name: name of the host's setting.
        native: settings of the host's worker.
        spec: spec of kl-plugins, or a text with ``observe``.
        same_gradient: whether both have the same gradient. If not, the result is the cost of another gradient.
        target: largest accepted increase of a step's duration, as a share of the duration; None if there is no target.
    """

    name: str
    native: dict[str, Any]
    spec: str
    same_gradient: bool = True
    target: float | None = 0.01

    @property
    def observes(self) -> bool:
        """Whether the host's own KL trains in both arms."""
        return looks_like_observation(self.spec)


OBSERVED = "k2@loss/is:token"
"""The spec that is measured where the host's own KL is observed."""


def _observed(name: str, native: dict[str, Any], prefix: str = "") -> tuple[Pair, Pair]:
    """Return the pair without probes, and the pair with a probe in every step, which gives the time of a probe."""
    text = f"{prefix}observe:{OBSERVED}"
    return Pair(name, native, text), Pair(name, native, f"{text}/probe:1", target=None)


def _top_k(name: str, native: dict[str, Any]) -> tuple[Pair, Pair]:
    """Return the pair of the default, and that of the k and draws that the rule of `top_k/findings.py` takes."""
    specs = "exact@loss/top:64", "exact@loss/top:16/draws:8"
    without, drawn = (Pair(name, native, spec, same_gradient=False, target=0.03) for spec in specs)
    return without, drawn


PAIRS: dict[str, tuple[Pair, ...]] = {
    "trl": (
        Pair("k3", {"use_bias_correction_kl": False}, "k3@loss"),
        Pair("k3, use_bias_correction_kl", {"use_bias_correction_kl": True}, "k3+@loss/is:token/behaviour:old"),
        Pair("k3", {"use_bias_correction_kl": False}, "exact@loss", same_gradient=False, target=None),
        *_top_k("k3", {"use_bias_correction_kl": False}),
        *_observed("k3", {"use_bias_correction_kl": False}),
    ),
    "verl": (
        Pair("low_var_kl", {"estimator": "low_var_kl"}, "k3@loss"),
        Pair("k2", {"estimator": "k2"}, "k2@loss"),
        *_top_k("k2", {"estimator": "k2"}),
        *_observed("low_var_kl", {"estimator": "low_var_kl"}, "low_var_kl/"),
    ),
    "openrlhf": (
        Pair("k3", {"estimator": "k3"}, "k3@loss"),
        Pair(
            "k2, unbiased_gradient",
            {"estimator": "k2", "unbiased_gradient": True},
            "k2@loss/is:token/behaviour:old/cap:10",
        ),
        *_top_k("k3", {"estimator": "k3"}),
        *_observed("k3", {"estimator": "k3"}, "k3/"),
    ),
}


@dataclass(frozen=True)
class Plan:
    """The work of a worker: every pair, round after round, with each arm once per round, in changing order.

    Attributes:
        size: sizes of model and batch.
        pairs: pairs to measure.
        rounds: number of rounds of all arms.
        steps: timed optimizer steps of an arm in a round, after one step of warm-up.
        loaded: keep the models of both arms in memory, and change arms without a step of warm-up. Then arms can change
            after every step, so that slow drifts of the machine's speed cancel. In veRL one model serves both arms.
            TRL's worker cannot do it.
    """

    size: Size
    pairs: tuple[Pair, ...]
    rounds: int
    steps: int
    loaded: bool = False
    seed: int = field(default=0)

    def write(self, path: Path) -> None:
        """Write the plan for the worker."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read the plan that :meth:`write` wrote. The worker calls this method."""
        data = json.loads(path.read_text())
        pairs = tuple(Pair(**pair) for pair in data.pop("pairs"))
        return cls(size=Size(**data.pop("size")), pairs=pairs, **data)
