"""The report of all benchmarks on one page, with a list of what was not measured; `python -m benchmarks.report`."""
