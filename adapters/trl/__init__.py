"""TRL under a KL spec: GRPO and RLOO with one new field, ``kl``.

``GRPOConfig``, ``GRPOTrainer``, ``RLOOConfig`` and ``RLOOTrainer`` are TRL's own classes with that field and the hooks
behind it; TRL's own stay as they are. A config with a spec cannot be given to a trainer without the hooks, which would
ignore it. ``attach`` gives the field and the hooks to TRL's classes in place, for code that keeps its own imports.
Nothing of TRL or torch is imported before it is needed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kl_plugins.adapters.base import HostAdapter, parse
from kl_plugins.adapters.trl import unsloth
from kl_plugins.adapters.trl.processes import end_process_group
from kl_plugins.hosts import Finding, Host
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation, looks_like_observation

if TYPE_CHECKING:
    from kl_plugins.adapters.trl.classes import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from kl_plugins.adapters.trl.config import Run

__all__ = ["GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer", "attach", "detach", "diagnose", "run"]

FIELD = "kl"
"""Name of the new field of TRL's configs, which holds the spec."""

SCRIPTS = ("grpo", "rloo")
"""TRL's scripts whose trainers have the hooks."""

HOST = Host(
    name="trl",
    title="TRL",
    distribution="trl",
    packages=("trl",),
    supported=">=0.28,<1.17",
    tested=("0.28.0", "1.0.0", "1.16.0"),
    keys={
        "loss": "kl in GRPOConfig, kl: in YAML, --kl on the command line; with beta > 0",
        "reward": "kl in GRPOConfig or RLOOConfig; with beta > 0",
        "advantage": "kl in GRPOConfig or RLOOConfig; with beta > 0",
    },
    module="kl_plugins.adapters.trl",
    explainer="kl_plugins.adapters.trl.explained",
    aggregation=(
        "GRPO by loss_type: dapo (the default), bnpo, cispo, vespo: token mean; grpo, sapo: sequence mean; "
        "dr_grpo: constant; luspo: token sum. RLOO: token sum"
    ),
)


class TRLAdapter(HostAdapter):
    """TRL under kl-plugins; its settings are a :class:`~kl_plugins.adapters.trl.config.Run`."""

    def specs_of(self, config: Run) -> KLSpec | None:
        """Return the spec of a run, or None if it has none or only observes one.

        Args:
            config: the run.

        Raises:
            KLSpecError: the text is not a valid spec.
            UnsupportedHostError: Unsloth is in this process, so the spec would have no effect.
        """
        text = config.text
        if text is None or looks_like_observation(text):
            return None
        spec = parse(text)
        unsloth.refuse(f"{FIELD}={text!r} cannot be used here")
        return spec

    def refusals(self, specs: KLSpec, config: Run) -> Iterator[tuple[str, KLSpec, str]]:
        """Give each contradiction between the spec and the rest of a run.

        Args:
            specs: the spec.
            config: the run.
        """
        from kl_plugins.adapters.trl import refusals

        for problem in refusals.problems(specs, config):
            yield f"{FIELD}=", specs, problem

    def observation_of(self, config: Run) -> Observation | None:
        """Return what a run asks to observe, or None.

        Args:
            config: the run.
        """
        if not looks_like_observation(config.text):
            return None
        from kl_plugins.adapters.trl import observe

        return observe.observation_of(config)

    def unobservable(self, config: Run) -> Iterator[tuple[str, Observation, str]]:
        """Give each reason why a run cannot be observed.

        Args:
            config: the run.
        """
        observation = self.observation_of(config)
        if observation is not None:
            from kl_plugins.adapters.trl import observe

            for problem in observe.problems(observation, config):
                yield f"{FIELD}=", observation, problem

    def further_findings(self, found: str) -> Iterator[Finding]:
        """Give the line of ``kl-plugins doctor`` about Unsloth, if it is installed.

        Args:
            found: the installed version of TRL.
        """
        if find_spec(unsloth.NAME) is not None:
            problem = (
                "installed; a process that imports it has its trainers in the place of TRL's, and no spec is used there"
            )
            yield Finding("warning", unsloth.NAME, problem, unsloth.REMEDY)

    def run(self, module: str, argv: Sequence[str]) -> int:
        """Run one of TRL's training scripts in this process, with the hooks in and with TRL's own parser.

        Args:
            module: ``trl`` (the script is then the first argument) or ``trl.scripts.grpo``.
            argv: the script's arguments.

        Returns:
            Exit status.

        Raises:
            ValueError: a key in the YAML file or an argument that TRL does not know.
        """
        arguments = list(argv)
        if module.startswith("trl.scripts."):
            name = module.removeprefix("trl.scripts.")
        else:
            name = arguments.pop(0) if arguments else ""
        if name not in SCRIPTS:
            print(
                f"kl-plugins: {name or 'no script'!r}: the TRL scripts with a KL seam are {' and '.join(SCRIPTS)}, "
                "for example: kl-plugins run trl grpo --config x.yaml --kl default",
                file=sys.stderr,
            )
            return 2
        self.attach()
        script = importlib.import_module(f"trl.scripts.{name}")
        # Usage and errors then name the command that was typed.
        sys.argv = [f"kl-plugins run trl {name}", *arguments]
        parser = script.make_parser()
        # TRL's default for scripts is to drop what it does not know. Here a misspelt key must not train without it.
        script.main(*parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True))
        end_process_group()
        return 0


ADAPTER = TRLAdapter(HOST)


def attach() -> None:
    """Give TRL's own GRPO and RLOO classes the ``kl`` field and the hooks, in place. Safe to call twice.

    Call it before a config class of your own is derived from TRL's: a dataclass does not pass on later fields.

    Raises:
        UnsupportedHostError: this TRL is not one that kl-plugins was checked with, or Unsloth has rewritten it.
    """
    ADAPTER.attach()


def detach() -> None:
    """Restore TRL's original objects. Safe to call twice. Trainers built under a spec stop regularising."""
    ADAPTER.detach()


def diagnose() -> Sequence[Finding]:
    """Version and source findings for ``kl-plugins doctor``; reads TRL's files, imports nothing of it."""
    return ADAPTER.diagnose()


def run(module: str, argv: Sequence[str]) -> int:
    """Run one of TRL's training scripts under the plugin: ``kl-plugins run trl grpo --config x.yaml --kl SPEC``.

    It works under ``torchrun`` and ``accelerate launch`` as well.

    Args:
        module: ``trl`` (the script is then the first argument) or ``trl.scripts.grpo``.
        argv: the script's arguments: TRL's own, and ``--kl SPEC``.

    Returns:
        Exit status.

    Raises:
        ValueError: a key in the YAML file or an argument that TRL does not know.
    """
    return ADAPTER.run(module, argv)


def __getattr__(name: str) -> Any:
    if name in ("GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer"):
        from kl_plugins.adapters.trl import classes

        return getattr(classes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
