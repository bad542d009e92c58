"""Settings of a run, read from what people have: YAML, command lines, shell scripts, Hydra overrides, Python calls.

A reader knows formats and no host. It returns flat settings with dotted keys, and says for each of them where it was
found. What a setting means belongs to the adapter of the host. ``kl-plugins explain --host`` and
``kl-plugins doctor --config`` read with the same code.
"""

from kl_plugins.settings.reading import Format, UnreadableError, read_text, read_words
from kl_plugins.settings.values import Setting, Settings, Unknown

__all__ = ["Format", "Setting", "Settings", "Unknown", "UnreadableError", "read_text", "read_words"]
