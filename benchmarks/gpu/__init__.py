"""What has to be seen on a GPU, in stages of a few minutes: ``python -m benchmarks.gpu``."""
