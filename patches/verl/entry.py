"""The object of the entry point in the group ``verl.plugins``: veRL imports it and never calls it.

veRL 0.8 imports it where ``VERL_USE_EXTERNAL_MODULES`` names it.
"""

from __future__ import annotations

from kl_plugins.patches import verl

verl.attach()
