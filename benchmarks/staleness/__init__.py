"""Shows in the smallest possible system why an importance-weighted KL can run away on stale data."""
