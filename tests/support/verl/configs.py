"""veRL's own config, composed by Hydra from veRL's files."""

from functools import cache
from pathlib import Path
from typing import Any

import verl
from hydra import compose, initialize_config_dir


@cache
def composed(*overrides: str) -> Any:
    """The config of veRL's PPO programs with some settings changed; shared, so not to be changed itself.

    Args:
        *overrides: as on the command line.
    """
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))
