"""The reward of grpo.yaml: 1 if the last number of the completion is the answer, otherwise 0."""

import re


def correct(completions: list, answer: list[str], **unused: object) -> list[float]:
    """Return the rewards of a batch. TRL passes the completions and the other columns of the data by name."""
    numbers = [re.findall(r"\d+", completion[0]["content"]) for completion in completions]
    return [float(bool(found) and found[-1] == right) for found, right in zip(numbers, answer, strict=True)]
