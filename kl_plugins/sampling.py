"""How a host samples responses, as far as it decides what the sampler's log-probs mean.

With top-p, top-k or min-p the engine samples from a truncated policy. Its log-probs are those of the truncated policy,
log(p / S) with S the kept mass, or, in a raw mode, those of the policy that was never sampled. Both matter to an
importance weight. Every host reads its own settings into a :class:`Sampling`; what follows from them is written here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kl_plugins.spec import KLSpec

ALLOW_VARIABLE = "KL_PLUGINS_ALLOW_TRUNCATED_WEIGHTS"
"""Set to 1, products of weights against a truncated sampler are allowed."""

PRODUCTS = ("prefix", "sequence", "decision")
"""Corrections whose weight is a product over tokens."""

EFFECT_SIZES = {"top_p 0.95": 0.10, "top_p 0.9": 0.15, "top_k 20": 0.09, "min_p 0.05": 0.24}
"""Relative error of the reverse-KL gradient under k2@loss/is:token, by setting.

Exact expectation in one state with 200 tokens and logits of standard deviation 3, mean of 20 draws, weights against the
truncated sampler; ``tests/oracle/test_truncated_sampling.py`` computes it.
"""

EFFECTS = "relative error of the gradient in one state of 200 tokens: " + ", ".join(
    f"{100 * size:.0f} % at {name}" for name, size in EFFECT_SIZES.items()
)
"""How large the effect of truncation is, in words."""


@dataclass(frozen=True)
class Sampling:
    """The settings of generation that change the sampler's distribution; the defaults change nothing.

    Attributes:
        temperature: divides the logits. The trainer scores with the same temperature.
        top_p: kept probability mass; 1 keeps all.
        top_k: number of kept tokens; 0 or negative keeps all.
        min_p: smallest kept probability, relative to the largest; 0 keeps all.
        penalised: a repetition, presence or frequency penalty, or another logit processor, is in use.
        raw: the engine reports log-probs of the plain model: before temperature, penalties and truncation.
        unknown: the engine does not say which log-probs it reports; a weight is then refused where raw ones would be.
        logprobs_setting: name of the host's setting that decides about ``raw``, for messages.
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
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def __str__(self) -> str:
        found = [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        found += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
        found += [f"top_k {self.top_k}"] if self.top_k > 0 else []
        found += [f"min_p {self.min_p:g}"] if self.min_p > 0 else []
        found += ["penalties"] if self.penalised else []
        mode = "log-probs of an unknown mode" if self.unknown else f"{'raw' if self.raw else 'processed'} log-probs"
        return f"{', '.join(found)}, {mode}" if found else f"the whole distribution, {mode}"

    def problems(self, spec: KLSpec, source: str) -> Iterator[str]:
        """Why a spec cannot be used with these settings; each is a sentence that says what to do.

        Args:
            spec: what the user named.
            source: whose log-probs its importance weight divides by (``sampler``, ``old``, ...).
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
                f"is:{spec.correction} multiplies the weights of many tokens, and under truncated sampling ({self}) "
                "each weight against the sampler holds the kept probability mass as a factor below 1, so the product "
                "decays (0.99 ** 1000 = 4e-5) and the KL with it; sample the whole distribution (top_p 1, no top_k, no "
                f"min_p), use is:token, or set {ALLOW_VARIABLE}=1 to go on all the same"
            )

    def caveats(self, spec: KLSpec, source: str) -> tuple[str, ...]:
        """What a reader of the target has to know about these settings.

        Args:
            spec: what the user named.
            source: whose log-probs its importance weight divides by.
        """
        if not self.truncated:
            return ()
        if spec.needs_behaviour and source == "sampler":
            text = "each weight against the truncated sampler holds the kept probability mass as a factor"
        elif spec.needs_behaviour:
            text = "the weight is that of a policy that was never sampled, because sampling was truncated"
        else:
            text = "the data come from a truncated policy, and nothing corrects for that"
        return (f"{text} ({EFFECTS})",)


def read_text(text: str) -> Sampling:
    """Read the settings of generation out of a config or command line of any host, by their names.

    ``top_p: 0.9`` in YAML, ``actor_rollout_ref.rollout.top_p=0.9`` as an override and ``--rollout.top_p 0.9`` as a flag
    all count; settings of validation (a key that holds ``val``) do not, because no training data come from it. The
    last of several values wins. What a run really uses is in its receipt.

    Args:
        text: the content of a file, or a command line.
    """
    found: dict[str, str] = {}
    for key, value in _SETTING.findall(text):
        if "val" not in key.lower():
            found[re.split(r"[.\-]", key)[-1]] = value.strip("'\"")
    number = {
        name: float(found[name]) for name in ("temperature", "top_p", "top_k", "min_p") if _is_number(found, name)
    }
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    neutral = {"repetition_penalty": 1.0}
    return Sampling(
        temperature=number.get("temperature", 1.0),
        top_p=number.get("top_p", 1.0),
        top_k=int(number.get("top_k", 0)),
        min_p=number.get("min_p", 0.0),
        penalised=any(_is_number(found, name) and float(found[name]) != neutral.get(name, 0.0) for name in penalties),
        raw=found.get("logprobs_mode", "").startswith("raw"),
    )


_NAMES = "temperature|top_p|top_k|min_p|repetition_penalty|presence_penalty|frequency_penalty|logprobs_mode"
_SETTING = re.compile(rf"(?m)(?<![\w.])([\w.\-]*?(?:{_NAMES}))[\"']?(?:[ \t]*[:=][ \t]*|[ \t]+)([\w.'\"+\-]+)")


def _is_number(found: dict[str, str], name: str) -> bool:
    try:
        float(found.get(name, ""))
    except ValueError:
        return False
    return True
