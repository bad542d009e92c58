"""What the tensors of each host framework mean, and the core call built from them."""
