"""Runs with a real language model, SmolLM2-135M-Instruct: a demonstration, stale data, and the times of TRL's step."""
