"""Comparison of steps with a spec and steps with the host's own KL of the same meaning, measured in turns."""
