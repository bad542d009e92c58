"""Tests and measurements for a GPU, in stages of a few minutes; run them by ``python -m benchmarks.gpu``."""
