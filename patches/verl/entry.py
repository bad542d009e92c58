"""The object of the entry point in the group ``verl.plugins``: veRL imports it and never calls it."""

from __future__ import annotations

from kl_plugins.patches import verl

verl.attach()
