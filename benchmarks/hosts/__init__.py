"""Test that a spec gives one gradient in three hosts: each host's real update, compared with the core in float64."""
