"""Tests of the benchmarks: ``core`` needs no host, the other folders need the host that they are named after."""
