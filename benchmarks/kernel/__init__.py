"""Time and memory of the exact KL compared with its peers; run it by ``python -m benchmarks.kernel``."""
