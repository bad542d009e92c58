"""The accuracy that is promised, and the cases in which it is measured against float64 on the same inputs.

``python -m tests.core.exact.accuracy`` measures every case and prints one JSON object: the instruction set that torch
computes with (``ATEN_CPU_CAPABILITY`` sets it, before torch starts), the number of checks, and the worst of each kind.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from kl_plugins import exact_kl
from tests.core.exact.support import Rows, capped, make_rows, norm_error, textbook

ROOM = 0.5
"""The share of a promise that a measured error may use: other processors round otherwise."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISTANCES = (4.0, 0.5, 0.1, 0.03, 0.0045, 0.0005)
GRID = list(itertools.product(DTYPES, (1.0, 4.0, 8.0), DISTANCES))


class Check(NamedTuple):
    """One number that was compared with float64.

    Attributes:
        case: its name.
        kind: of the number.
        error: relative, norm-wise over rows. Of a log-prob: absolute, divided by 3 + its size. Of a gradient in 16
            bits: without what rounding the exact gradient costs, which is the same on every processor.
        promise: what the error has to stay below; in 16 bits what the rounding leaves of 0.5 %.
    """

    case: str
    kind: str
    error: float
    promise: float

    @property
    def ratio(self) -> float:
        """Error over promise."""
        return self.error / self.promise


class Case(NamedTuple):
    """Rows, made when they are needed, and the options of the call."""

    rows: Callable[[], Rows]
    options: dict[str, float] = {}  # noqa: RUF012


def grid(dtype: torch.dtype, std: float, distance: float, rows: int = 48, vocabulary: int = 1000) -> Case:
    """Gaussian logits and labels that the policy drew."""
    return Case(lambda: make_rows(rows, vocabulary, std=std, distance=distance, dtype=dtype))


def outlying_label(shift: float) -> Rows:
    """Every label is the least likely token, 20 nats likelier under the policy; all other tokens are shifted."""
    rows = make_rows(48, 1000, std=1.0, distance=0.01)
    least = rows.logits.argmin(-1, keepdim=True)
    ref_logits = (rows.ref_logits + shift).scatter(-1, least, rows.logits.gather(-1, least) - 20.0)
    return Rows(rows.logits, ref_logits, least[:, 0])


def far_label(spreads: float, std: float, distance: float, options: dict[str, float]) -> Rows:
    """Every label's log-ratio is this many standard deviations from the mean, too few to be computed again."""
    rows = make_rows(48, 1000, std=std, distance=distance)
    temperature = options.get("temperature", 1.0)
    logits = capped(rows.logits.double(), options.get("softcap")) / temperature
    difference = logits - capped(rows.ref_logits.double(), options.get("ref_softcap")) / temperature
    p = torch.softmax(logits, -1)
    centred = difference - (p * difference).sum(-1, keepdim=True)
    spread = (p * centred.square()).sum(-1, keepdim=True).sqrt()
    return rows._replace(labels=(centred / spread - spreads).abs().argmin(-1))


def shifted(offset: float, distance: float = 0.01) -> Rows:
    """All reference logits are moved by the same number, which changes no probability."""
    rows = make_rows(48, 1000, std=1.0, distance=distance)
    return rows._replace(ref_logits=rows.ref_logits + offset)


OPTIONS: list[dict[str, float]] = [
    {"temperature": 0.7},
    {"temperature": 1.9, "softcap": 30.0, "ref_softcap": 30.0},
    {"softcap": 12.0},
    {"ref_softcap": 12.0, "temperature": 0.5},
    {"softcap": 30.0, "ref_softcap": 50.0},
    {"softcap": 50.0, "ref_softcap": 30.0, "temperature": 1.7},
]
FAR_OPTIONS: list[dict[str, float]] = [
    {},
    {"temperature": 0.6},
    {"softcap": 30.0, "ref_softcap": 30.0},
    {"softcap": 12.0},
]

CASES: dict[str, Case] = {
    **{f"{str(of[0])[6:]}, std {of[1]}, distance {of[2]}": grid(*of) for of in GRID},
    **{
        f"{str(dtype)[6:]}, vocabulary 151936, distance {distance}": grid(dtype, 4.0, distance, 8, 151_936)
        for dtype in (torch.float32, torch.bfloat16)
        for distance in (0.1, 0.0045)
    },
    **{
        f"distance {distance}, {options}": Case(
            lambda distance=distance: make_rows(48, 1000, distance=distance), options
        )
        for options in OPTIONS
        for distance in (1.0, 0.0045)
    },
    **{
        f"outlying label, shift {shift}": Case(lambda shift=shift: outlying_label(shift))
        for shift in (20.0, -20.0, 200.0)
    },
    **{f"common offset {offset}": Case(lambda offset=offset: shifted(offset)) for offset in (2.0, -20.0, 200.0)},
    **{
        f"far label {spreads}, distance {distance}, {options}": Case(
            lambda of=(spreads, 8.0, distance, options): far_label(*of), options
        )
        for spreads in (-3.5, 3.0)
        for distance in (1.0, 0.1)
        for options in FAR_OPTIONS
    },
}


def measure(name: str, case: Case, backend: str = "eager") -> Iterator[Check]:
    """KL, log-probs and both gradients of a case."""
    rows, options = case.rows(), case.options
    logits = rows.logits.detach().requires_grad_()
    found = exact_kl(logits, rows.ref_logits, rows.labels, backend=backend, **options)
    exact = rows.logits.detach().double().requires_grad_()
    wanted = textbook(exact, rows.ref_logits, rows.labels, **options)
    mean = float(wanted.kl.detach().mean())
    kind, promise = ("KL from 1e-5 nats", 1e-5) if mean >= 1e-5 else ("KL below 1e-5 nats", 1e-4)
    yield Check(name, kind, norm_error(found.kl.detach(), wanted.kl.detach()), promise)
    for part in ("logp", "ref_logp"):
        one, other = getattr(found, part).detach().double(), getattr(wanted, part).detach()
        yield Check(name, "log-prob", float(((one - other).abs() / (3.0 + other.abs())).max()), 1e-6)
    # A loss scale, as float16 is trained with: its numbers end at 6e-8.
    scale = 2.0**12 if rows.logits.dtype == torch.float16 and mean < 0.1 else 1.0
    weight = torch.linspace(0.5, 1.5, len(rows.labels))
    for part in ("kl", "logp"):
        (grad,) = torch.autograd.grad((getattr(found, part) * weight).sum() * scale, logits, retain_graph=True)
        (right,) = torch.autograd.grad((getattr(wanted, part) * weight).sum() * scale, exact, retain_graph=True)
        error = norm_error(grad, right)
        if grad.dtype == torch.float32:
            yield Check(name, "gradient in float32", error, 1e-4)
        else:
            rounding = norm_error(right.to(grad.dtype), right)
            yield Check(name, "gradient in 16 bits, beyond its rounding", error - rounding, 5e-3 - rounding)


def worst(checks: Iterable[Check]) -> dict[str, Any]:
    """The instruction set, the number of checks, and the worst check of each kind; NaN is worse than any number."""
    found = list(checks)
    most: dict[str, Check] = {}
    for check in sorted(found, key=lambda check: math.inf if math.isnan(check.ratio) else check.ratio):
        most[check.kind] = check
    return {"capability": torch.backends.cpu.get_cpu_capability().lower(), "checks": len(found), "worst": most}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(worst(check for name, case in CASES.items() for check in measure(name, case))))
