"""KL regularisers with the right gradient for RLHF frameworks."""
