"""The study, `python -m benchmarks.study`: published claims about KL regularisers, tested in real RL runs."""
