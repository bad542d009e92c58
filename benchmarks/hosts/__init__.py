"""One spec, three hosts, one gradient: every host's real update on the same rollouts, beside the core in float64."""
