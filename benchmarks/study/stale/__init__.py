"""`python -m benchmarks.study.stale`: choose the default KL spec where rollouts are stale, by rules fixed first."""
