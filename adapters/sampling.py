"""The sampling settings are in :mod:`kl_plugins.sampling`."""

from kl_plugins.sampling import Sampling

__all__ = ["Sampling"]
