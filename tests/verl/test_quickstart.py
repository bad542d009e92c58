"""The commands of README and of the quickstart are settings that veRL has, and under which their specs work."""

import pytest

from kl_plugins.adapters.verl import ADAPTER
from kl_plugins.adapters.verl.refusals import contradictions
from tests.support.guides import arguments
from tests.support.verl.configs import composed

PROGRAM = "verl.trainer.main_ppo"


@pytest.mark.parametrize(("page", "commands"), [("README.md", 1), ("docs/quickstart/verl.md", 3)])
def test_the_commands_are_valid(page: str, commands: int) -> None:
    found = arguments(page, PROGRAM)
    assert len(found) == commands
    for settings in found:
        config = composed("algorithm.adv_estimator=grpo", *settings)
        specs = ADAPTER.specs_of(config)
        assert specs
        assert not list(contradictions(specs, config))
