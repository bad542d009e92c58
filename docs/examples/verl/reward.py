"""The reward of the veRL examples: 1 if the last number of the response is the answer, otherwise 0."""

import re


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **unused: object
) -> float:
    """Return the reward of a response. veRL calls this function; the arguments are columns of the data."""
    numbers = re.findall(r"\d+", solution_str or "")
    return float(bool(numbers) and numbers[-1] == ground_truth)
