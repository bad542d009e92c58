"""The main demonstration: five KL regularisers in real GRPO runs, measured exactly; run `python -m benchmarks.demo`."""
