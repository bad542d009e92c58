"""The reward of the OpenRLHF examples: 1 if the last number of the response is the answer, otherwise 0."""

import re

import torch


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """Return the rewards of a batch. OpenRLHF calls this function; a query is a prompt with its response."""
    responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    numbers = [re.findall(r"\d+", response) for response in responses]
    hits = [float(bool(found) and found[-1] == right) for found, right in zip(numbers, labels, strict=True)]
    rewards = torch.tensor(hits)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"correct": rewards}}
