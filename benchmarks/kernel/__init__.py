"""Exact full-vocabulary KL against its peers, in time and memory: ``python -m benchmarks.kernel``."""
