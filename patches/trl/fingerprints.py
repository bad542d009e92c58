"""Digests of the TRL functions that are wrapped, by the first version that has them; made by ``read_fingerprints``."""

from __future__ import annotations

from pathlib import Path

from kl_plugins.patches.fingerprint import fingerprint_in_file

FILES = {"GRPOTrainer": "trainer/grpo_trainer.py", "RLOOTrainer": "trainer/rloo_trainer.py"}


def read_fingerprints(trl_folder: Path) -> dict[str, str | None]:
    """Digests of the wrapped functions in an unpacked TRL, to add a version to the table below.

    Args:
        trl_folder: the ``trl`` package folder of any version; it is read, not imported.

    Returns:
        Digest by qualified name, None where that version lacks the function.
    """
    return {name: fingerprint_in_file(trl_folder / FILES[name.split(".")[0]], name) for name in FINGERPRINTS}


FINGERPRINTS: dict[str, dict[str, str]] = {
    "GRPOTrainer._get_per_token_logps_and_entropies": {
        "0.28.0": "e9d122b6abf3207f",
        "0.29.0": "aff24eacfcb3a2af",
        "1.0.0": "f9853a00f1f83891",
        "1.1.0": "76314565fd19e0a1",
        "1.7.0": "b3941be29a8c8d23",
        "1.8.0": "234e6f60333416c6",
        "1.10.0": "8b739fddc33da199",
        "1.11.0": "57e0a63e098f8144",
        "1.14.0": "0ac3130741ff7b8d",
        "1.15.0": "d72190d114a97935",
    },
    "GRPOTrainer._compute_loss": {
        "0.28.0": "49196044657bf05d",
        "0.29.1": "99542ff0b2b9b8a0",
        "1.0.0": "39146c33fe58bc7c",
        "1.1.0": "859b40bfecf51a23",
        "1.7.0": "44576efa58b5dbde",
        "1.8.0": "9b4981ccbcc4b18e",
        "1.9.0": "876f57ceed692098",
        "1.9.1": "8fe4490540107203",
        "1.10.0": "e36fb6b05345b192",
    },
    "GRPOTrainer._generate_and_score_completions": {
        "0.28.0": "1f1d4137467bdc36",
        "0.29.0": "96e8e2477814ef33",
        "0.29.1": "44476867afabac6e",
        "1.0.0": "3f8266b394529437",
        "1.1.0": "63c2ca37f6db6708",
        "1.2.0": "00abb35ece591b62",
        "1.3.0": "3cb196570ef6c260",
        "1.6.0": "e2f76e17b0a4a45b",
        "1.7.0": "99b13654f04f5ec4",
        "1.8.0": "1ba3b0510a9957b2",
        "1.9.0": "fbd3402c20d65016",
        "1.11.0": "13c0a2f7e4d6b3dc",
        "1.14.0": "cd8c776c499fd528",
        "1.14.2": "5400711f75287bd7",
        "1.15.0": "4041a2a7c30889a9",
    },
    "GRPOTrainer._calculate_rewards": {
        "0.28.0": "591170a2922de834",
        "0.29.0": "48ce6484fad22780",
        "1.0.0": "a8684178fb6fbbf3",
        "1.8.0": "6d6b110c4da594cc",
        "1.9.0": "6dbded6fda995c55",
        "1.10.0": "1a957b5257f84b49",
        "1.14.0": "bd1d72510a3c21f6",
    },
    "RLOOTrainer._get_per_token_logps_and_entropies": {
        "0.28.0": "e9d122b6abf3207f",
        "0.29.0": "aff24eacfcb3a2af",
        "1.0.0": "f9853a00f1f83891",
        "1.1.0": "76314565fd19e0a1",
        "1.7.0": "b3941be29a8c8d23",
        "1.10.0": "9210704f5e2e9f8e",
        "1.11.0": "07d80d2a2c70a5cb",
        "1.14.0": "e09f573af02e3767",
        "1.15.0": "d72190d114a97935",
    },
    "RLOOTrainer._compute_loss": {
        "0.28.0": "5f6ff0f536596456",
        "0.29.1": "d3ba81e33ec0090a",
        "1.0.0": "698291ebff9f447c",
        "1.1.0": "7d73fd3b24a869f4",
        "1.7.0": "79cff450491d4950",
        "1.9.0": "91a61e522d429a6d",
    },
    "RLOOTrainer._generate_and_score_completions": {
        "0.28.0": "8b4ddfe5a4ab3a84",
        "0.29.0": "83f6e49a20086707",
        "0.29.1": "f9b610fe8c5886d8",
        "1.0.0": "1a4085c20b5324f7",
        "1.1.0": "8034d233864f3597",
        "1.3.0": "1c905a0940013c82",
        "1.6.0": "43273ebe34373295",
        "1.7.0": "abce2faac3cc2803",
        "1.9.0": "a1840f70f593f0f4",
        "1.11.0": "901a40b8e6d3f677",
        "1.14.0": "6cfcdae896ec2c21",
        "1.14.2": "9476dc71251f956f",
        "1.15.0": "bc56e0e70c1497a1",
    },
}
