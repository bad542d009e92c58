"""A step under a spec beside a step under the host's own KL of the same meaning, in turns."""
