"""Runs with a real language model, SmolLM2-135M-Instruct: a demonstration, staleness, and TRL's step times."""
