"""What runs on the GPU machine, call by call; ``benchmarks.gpu.bundle`` puts it into the bundle."""
