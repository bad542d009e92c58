"""The reward of grpo.yaml: 1 where the last number of the completion is the answer, else 0."""

import re


def correct(completions: list, answer: list[str], **unused: object) -> list[float]:
    """TRL calls it with the completions of a batch and with the other columns of the data, by name."""
    numbers = [re.findall(r"\d+", completion[0]["content"]) for completion in completions]
    return [float(bool(found) and found[-1] == right) for found, right in zip(numbers, answer, strict=True)]
