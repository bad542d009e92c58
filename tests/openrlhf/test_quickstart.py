"""The commands of README and of the quickstart are flags that OpenRLHF has, and under which their specs work."""

from pathlib import Path

import pytest

from kl_plugins.adapters.openrlhf.config import spec_of
from tests.support.guides import arguments, blocks
from tests.support.openrlhf import command_line


@pytest.mark.parametrize(("page", "commands"), [("README.md", 1), ("docs/quickstart/openrlhf.md", 3)])
def test_the_commands_are_valid(page: str, commands: int, assets: Path) -> None:
    found = arguments(page, command_line.MODULE)
    assert len(found) == commands
    for flags in filter(None, found):
        assert spec_of(command_line.parse(assets, flags)) is not None


def test_the_reward_function_rewards_digits() -> None:
    (code,) = blocks("docs/quickstart/openrlhf.md", "python")
    names: dict[str, object] = {}
    exec(compile(code, "reward.py", "exec"), names)
    reward = names["reward_func"]
    assert callable(reward)
    assert reward(["ab12"], ["ab"], [None])["rewards"].tolist() == [1.0]
