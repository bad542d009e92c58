"""Presets: short names for specs that papers and frameworks use."""

from __future__ import annotations

PRESETS: dict[str, str] = {
    "default": "k2@loss/is:token/floor:0.5",
    "ppo": "k1@reward",
    "grpo": "k3@loss",
    "deepseek-v3.2": "k3+@loss/is:token/behaviour:old",
    "frpo": "k1@advantage",
    "reinforce++": "k1@reward",
    "reinforce++-baseline": "k2@loss",
    "sequence": "k2@loss/horizon:sequence/is:decision",
    "exact": "exact@loss",
}

NOTES: dict[str, str] = {
    "default": "reverse KL, corrected for stale data, with a pull that does not fade; the future-KL term is opt-in",
    "ppo": "Ziegler et al. 2019 (arXiv 1909.08593): KL in the reward",
    "grpo": "Shao et al. 2024 (arXiv 2402.03300): k3 as loss",
    "deepseek-v3.2": "DeepSeek-V3.2: k3 times the live token ratio; on stale data its pull on dropped tokens fades",
    "frpo": "FRPO (arXiv 2601.10201): reward-to-go KL, added after normalisation",
    "reinforce++": "REINFORCE++ (arXiv 2501.03262): KL in the reward",
    "reinforce++-baseline": "REINFORCE++-baseline (arXiv 2501.03262): k2 as loss",
    "sequence": "the sequence-level reverse-KL gradient, per-decision importance weights",
    "exact": "full-vocabulary KL at every state, no token noise",
}
"""One line for each preset that says where it comes from."""

NATIVE_VALUES: dict[str, str] = {
    "k1": "k1@reward",
    "kl": "k1@reward",
    "mse": "k2@loss",
    "low_var_kl": "k3@loss",
    "full": "exact@loss",
}
"""Values of the frameworks' own KL settings, and the spec nearest to each. These values are never read as specs."""
