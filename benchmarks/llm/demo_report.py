"""The demonstration as text: a table with explanations, and examples of what the policies write."""

from __future__ import annotations

import textwrap
from typing import Any

from .settings import HOST, NONE, meaning

WIDTH = 110
HEADS = ("reward", "exact KL", "entropy", "E[R]-bKL", "tokens", "s/step")
CAUTION = (
    "This is a demonstration, not evidence: one seed and few steps. It shows that a real model trains under each term, "
    "what the term holds, and what it costs. The order of arms with like values may be chance."
)


def text(found: dict[str, Any]) -> str:
    """Return the whole report as plain text."""
    settings, arms = found["settings"], found["arms"]
    first = next(iter(arms.values()))["curve"]
    steps, sampled = first[-1]["step"], first[-1]["sampled"]
    where = found["machine"]["gpu"] or f"{found['machine']['processor']}, {found['machine']['cores']} cores"
    lines = [
        *_wrapped(
            f"{settings['model']} after {steps} steps of TRL {found['versions']['trl']}'s GRPO: "
            f"{settings['prompts']} prompts x {settings['generations']} completions of at most {settings['tokens']} "
            f"tokens per step, learning rate {settings['learning_rate']:g}, beta {settings['beta']:g} in every arm "
            f"with a KL; on {where}."
        ),
        "",
        *_table(arms, settings["beta"]),
        "",
        *_wrapped(f"reward: {found['task']['reward']}, on prompts that were not trained on ({sampled} completions)."),
        *_wrapped(
            "exact KL, entropy: nats per completion, from the whole distribution at every state of those completions; "
            "the KL is that of the policy to the model before training."
        ),
        *_wrapped("E[R]-bKL: what every arm with a KL is meant to raise. tokens: of a completion."),
        *_wrapped("s/step: median seconds of a step, sampling included" + (
            "; the arms ran side by side on one machine, so compare these with care." if found["workers"] > 1 else "."
        )),
        "",
        *_wrapped(CAUTION),
        "",
        *_texts(arms),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def label(arm: str) -> str:
    """Return the name of an arm for tables and pictures."""
    return meaning(arm)


def _table(arms: dict[str, Any], beta: float) -> list[str]:
    names = {arm: label(arm) for arm in arms}
    width = max(len(name) for name in (*names.values(), "before training"))
    lines = [f"{'':{width}}" + "".join(f"{head:>10}" for head in HEADS)]
    start = next(iter(arms.values()))["curve"][0]
    lines.append(_row("before training", width, start, beta, None))
    lines += [_row(names[arm], width, made["curve"][-1], beta, made["step_seconds"]) for arm, made in arms.items()]
    return lines


def _row(name: str, width: int, point: dict[str, Any], beta: float, seconds: float | None) -> str:
    values = (
        f"{point['reward']:.3f}", f"{point['kl']:.2f}", f"{point['entropy']:.1f}",
        f"{point['reward'] - beta * point['kl']:.3f}", f"{point['tokens']:.1f}",
        "" if seconds is None else f"{seconds:.2f}",
    )  # fmt: skip
    return f"{name:{width}}" + "".join(f"{value:>10}" for value in values)


def _texts(arms: dict[str, Any]) -> list[str]:
    before = next(iter(arms.values()))["before"]
    lines = ["What they write, to questions that were not trained on, with the same random numbers:"]
    width = max(len(_short(arm)) for arm in (*arms, "before"))
    for number, start in enumerate(before):
        lines += ["", *_wrapped(f"? {start['question']}")]
        lines += _answer("before", start, width)
        for arm, made in arms.items():
            lines += _answer(_short(arm), made["after"][number], width)
    return lines


def _answer(name: str, shown: dict[str, Any], width: int) -> list[str]:
    head = f"  {name:{width}} {shown['reward']:.2f}  "
    words = " ".join(shown["answer"].split()) or "(nothing)"
    return textwrap.wrap(words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _short(arm: str) -> str:
    return {NONE: "no KL", HOST: "TRL's KL"}.get(arm, arm)


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH)
