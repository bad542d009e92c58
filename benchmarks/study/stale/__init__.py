"""`python -m benchmarks.study.stale` chooses the default KL spec for stale rollouts, by rules fixed before the runs."""
