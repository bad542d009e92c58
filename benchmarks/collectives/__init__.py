"""Which collectives the plugin adds to a host's step: counted in real processes, and on paper."""
