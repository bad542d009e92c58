"""The collectives that the plugin adds to a host's step: counted in real processes, and predicted by a model."""
