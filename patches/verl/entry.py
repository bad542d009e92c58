"""The object of the entry point in the group ``verl.plugins``: veRL imports this module and never calls anything in it.

veRL 0.8 imports it where ``VERL_USE_EXTERNAL_MODULES`` names it. That is why it is a module of its own.
"""

from __future__ import annotations

from kl_plugins.adapters import verl

verl.attach()
