"""The programs that run on the GPU machine, one per call; ``benchmarks.gpu.bundle`` puts them into the bundle."""
