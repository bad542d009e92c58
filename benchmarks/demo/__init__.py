"""The main demonstration, `python -m benchmarks.demo`: five KL regularisers in real GRPO runs, measured exactly."""
