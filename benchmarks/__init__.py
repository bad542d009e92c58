"""Benchmarks and demonstrations; each runs as a module from the root of the repository."""
