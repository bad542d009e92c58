"""Why an importance-weighted KL can run away on stale data, in the smallest system that shows it."""
