"""What several test files share, and what tests and benchmarks share.

There is one folder per subject: ``core`` (batches, specs), ``oracle`` (exact enumeration), and one per host. The folder
of a host makes its models and data, starts it on the CPU, makes one update of it, and holds the fixtures of its tests.
Benchmarks import this package and nothing else from ``tests/``. No test file imports another one.
``tests/packaging/test_folders.py`` checks both.
"""
