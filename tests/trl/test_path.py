"""How many functions of ours a spec passes in TRL, from the flag to the gradient."""

from pathlib import Path

from tests.contract import path
from tests.support.trl import trainers


def test_the_path_of_a_spec_is_short(model: str, tmp_path: Path) -> None:
    from kl_plugins.adapters.base import parse
    from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer

    parse.cache_clear()  # another test may have parsed the same text
    path.start()
    try:
        trainer = trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss/is:token", max_steps=1)
        trainer.train()
    finally:
        found = path.stop()
    functions = path.listed(found)
    print(f"\n{len(functions)} functions:", *functions, sep="\n  ")
    assert functions[-1] == "term:kl_term"
    assert len(functions) <= path.LIMIT
    assert functions == path.in_guide("TRL"), "the guide lists other functions"
