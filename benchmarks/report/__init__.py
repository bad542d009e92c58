"""The report, `python -m benchmarks.report`: everything that was measured, and what was not, on one page."""
