"""Settings of sampling, and their consequences for importance weights that divide by the sampler's log-probs.

With top-p, top-k or min-p the engine samples from a truncated policy. In processed mode it reports the log-probs of the
truncated policy, log(p / S), where S is the kept probability mass. In raw mode it reports those of the full policy,
which is not the one that it samples from. Both change the importance weight. The adapter of each host reads the host's
settings into a :class:`Sampling`, and this module derives refusals and caveats from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kl_plugins.settings import Settings
from kl_plugins.settings import read_text as read_settings
from kl_plugins.spec import KLSpec

ALLOW_VARIABLE = "KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS"
"""Environment variable; the value 1 allows products of weights against a truncated sampler."""

PRODUCTS = ("prefix", "sequence", "decision")
"""Values of ``is:`` whose weight is a product over tokens."""

EFFECT_SIZES = {"top_p 0.95": 0.10, "top_p 0.9": 0.15, "top_k 20": 0.09, "min_p 0.05": 0.24}
"""Relative error of the reverse-KL gradient under k2@loss/is:token, by setting.

The numbers are exact expectations in one state with 200 tokens, with weights against the truncated sampler. They are
means over 20 draws of logits with standard deviation 3. ``tests/oracle/test_truncated_sampling.py`` computes them.
"""

EFFECTS = "relative error of the gradient in one state of 200 tokens: " + ", ".join(
    f"{100 * size:.0f} % at {name}" for name, size in EFFECT_SIZES.items()
)
"""The numbers of :data:`EFFECT_SIZES` as text, for messages."""


@dataclass(frozen=True)
class Sampling:
    """The generation settings that change the distribution of the sampler; the defaults leave it unchanged.

    Attributes:
        temperature: divisor of the logits. The trainer computes its log-probs with the same temperature.
        top_p: kept probability mass; 1 keeps all tokens.
        top_k: number of kept tokens; 0 or a negative number keeps all tokens.
        min_p: smallest kept probability, relative to the largest; 0 keeps all tokens.
        penalised: whether a repetition, presence or frequency penalty, or another logit processor, is in use.
        raw: whether the engine reports the log-probs of the unmodified model, that is, before temperature, penalties
            and truncation.
        unknown: whether the engine does not say which log-probs it reports. Then the same specs are refused as for raw
            log-probs.
        logprobs_setting: name of the host's setting that determines ``raw``; shown in messages.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    penalised: bool = False
    raw: bool = False
    unknown: bool = False
    logprobs_setting: str = "the engine's logprobs_mode"

    @property
    def truncated(self) -> bool:
        """Whether top-p, top-k or min-p excludes some tokens."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def shows_kept_mass(self) -> bool:
        """Whether a sampler's log-prob is the policy's minus the log of the kept probability mass."""
        return self.truncated and not (self.penalised or self.raw or self.unknown)

    def __str__(self) -> str:
        found = [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        found += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
        found += [f"top_k {self.top_k}"] if self.top_k > 0 else []
        found += [f"min_p {self.min_p:g}"] if self.min_p > 0 else []
        found += ["penalties"] if self.penalised else []
        mode = "log-probs of an unknown mode" if self.unknown else f"{'raw' if self.raw else 'processed'} log-probs"
        return f"{', '.join(found)}, {mode}" if found else f"the whole distribution, {mode}"

    def problems(self, spec: KLSpec, source: str) -> Iterator[str]:
        """Yield the reasons why a spec cannot be used with these settings; each text says what the user can do.

        Args:
            spec: the spec of the run.
            source: the policy whose log-probs the importance weight divides by (``sampler``, ``old``, ...).
        """
        if not spec.needs_behaviour or source != "sampler":
            return
        changed = [
            name
            for name, on in (
                (f"temperature {self.temperature:g}", self.temperature != 1),
                ("truncated sampling", self.truncated),
                ("penalties", self.penalised),
            )
            if on
        ]
        if (self.raw or self.unknown) and changed:
            reports = "may report" if self.unknown else "reports"
            yield (
                f"the engine {reports} raw log-probs, which are not those of the distribution that it samples from "
                f"({' and '.join(changed)}), so every importance weight would be wrong; set {self.logprobs_setting} to "
                "processed_logprobs, or use behaviour:old in the spec"
            )
        if self.truncated and spec.correction in PRODUCTS and os.environ.get(ALLOW_VARIABLE) != "1":
            yield (
                f"is:{spec.correction} multiplies the weights of many tokens; under truncated sampling ({self}) each "
                "weight against the sampler contains the kept probability mass, a factor below 1, so the product and "
                "the KL term shrink with the length of the response (0.99 ** 1000 = 4e-5); sample the whole "
                f"distribution (top_p 1, no top_k, no min_p), use is:token, or set {ALLOW_VARIABLE}=1 to run the spec "
                "nevertheless"
            )

    def caveats(self, spec: KLSpec, source: str) -> tuple[str, ...]:
        """Return how these settings make the estimate differ from the target; empty if they do not.

        Args:
            spec: the spec of the run.
            source: the policy whose log-probs the importance weight divides by.
        """
        if not self.truncated:
            return ()
        if spec.needs_behaviour and source == "sampler":
            text = "each weight against the truncated sampler contains the kept probability mass as a factor"
        elif spec.needs_behaviour:
            text = "the weight divides by a policy that was never sampled from, because sampling was truncated"
        else:
            text = "the data come from a truncated policy, and no weight corrects for that"
        return (f"{text} ({EFFECTS})",)


def read_text(text: str, suffix: str = "") -> Sampling:
    """Find the generation settings in a config or command line of any host, by their names.

    Every format of :mod:`kl_plugins.settings` is read: YAML, a shell script or command line with flags or overrides,
    Python. A key that contains ``val`` is skipped, because validation gives no training data. If a setting occurs
    several times, the last value is used. The receipt of a run shows the settings that the run uses.

    Args:
        text: the content of a file, or a command line.
        suffix: the suffix of the file; without a known one the format is guessed.

    Returns:
        The settings; those that the text does not contain have their default values.

    Raises:
        UnreadableError: the text is not what the suffix says.
    """
    return sampling_in(read_settings(text, "the text", suffix=suffix))


def sampling_in(settings: Settings) -> Sampling:
    """Return the generation settings among the settings of any host; see :func:`read_text`.

    Args:
        settings: settings with dotted keys.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        name = re.split(r"[.\-]", setting.key)[-1]
        if name in _NAMES and "val" not in setting.key.lower():
            found[name] = setting.value
    number = {name: float(value) for name, value in found.items() if _is_number(value)}
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    neutral = {"repetition_penalty": 1.0}
    return Sampling(
        temperature=number.get("temperature", 1.0),
        top_p=number.get("top_p", 1.0),
        top_k=int(number.get("top_k", 0)),
        min_p=number.get("min_p", 0.0),
        penalised=any(name in number and number[name] != neutral.get(name, 0.0) for name in penalties),
        raw=str(found.get("logprobs_mode", "")).startswith("raw"),
    )


_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "logprobs_mode"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
