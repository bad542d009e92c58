"""The command line: ``kl-plugins`` and ``python -m kl_plugins``."""
