"""veRL under a KL spec: the spec goes into ``kl_loss_type`` or ``algorithm.kl_penalty``, and nothing else changes.

veRL imports the plugin by itself, in every process, through the entry-point group ``verl.plugins``. :func:`attach` is
for programs that switch entry points off; :func:`require_receipts` is for trainers that are not veRL's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from kl_plugins.adapters.base import HostAdapter
from kl_plugins.hosts import Finding, Host

if TYPE_CHECKING:
    from kl_plugins.adapters.verl.config import Specs
    from kl_plugins.receipts import Receipt
    from kl_plugins.spec import KLSpec
    from kl_plugins.spec.observation import Observation

__all__ = ["attach", "detach", "diagnose", "require_receipts", "run"]

LOSS_KEY = "actor_rollout_ref.actor.kl_loss_type"
SCORE_KEY = "algorithm.kl_penalty"
"""veRL's settings that hold a spec."""

LOSS_BETA = "actor_rollout_ref.actor.kl_loss_coef"
SCORE_BETA = "algorithm.kl_ctrl.kl_coef"
"""veRL's settings that hold beta."""

HOST = Host(
    name="verl",
    title="veRL",
    distribution="verl",
    packages=("verl",),
    supported=">=0.8,<0.10",
    tested=("0.8.0", "0.9.0", "0.9.1"),
    keys={
        "loss": f"{LOSS_KEY}, with actor_rollout_ref.actor.use_kl_loss=True (beta: kl_loss_coef)",
        "reward": f"{SCORE_KEY}, with algorithm.use_kl_in_reward=True (beta: algorithm.kl_ctrl)",
        "advantage": f"{SCORE_KEY}, with algorithm.use_kl_in_reward=True (beta: algorithm.kl_ctrl)",
    },
    module="kl_plugins.adapters.verl",
    explainer="kl_plugins.adapters.verl.explained",
    aggregation=(
        "by actor_rollout_ref.actor.loss_agg_mode: token-mean (the default): token mean; "
        "seq-mean-token-sum: token sum; seq-mean-token-sum-norm: constant; seq-mean-token-mean: sequence mean"
    ),
)

GROUP, NAME = "verl.plugins", "kl_plugins"
"""The entry-point group in which veRL looks for plugins, and the name of ours in it."""

FIRST_WITH_ENTRY_POINTS = Version("0.9.dev0")
MODULES, ENTRY = "VERL_USE_EXTERNAL_MODULES", "kl_plugins.patches.verl.entry"
"""Before that version, veRL imports the modules that this variable lists."""

REMEDY = "Install the same kl-plugins on every node, in the environment that veRL's workers run in, and start again."
"""What to do about a worker that has no receipt."""


class VerlAdapter(HostAdapter):
    """veRL for :class:`~kl_plugins.adapters.base.HostAdapter`; its settings are a ``DictConfig``."""

    def specs_of(self, config: Any) -> Specs:
        """Read the specs of a whole veRL config, each in the key where it belongs.

        Args:
            config: veRL's ``DictConfig``.

        Raises:
            KLSpecError: a text is not a valid spec.
            ValueError: a spec is in the wrong key; the message names the right one.
        """
        from kl_plugins.adapters.verl.config import Specs, spec_in

        loss = spec_in(LOSS_KEY, config.actor_rollout_ref.actor.get("kl_loss_type"))
        return Specs(loss, spec_in(SCORE_KEY, config.algorithm.get("kl_penalty")))

    def refusals(self, specs: Specs, config: Any) -> Iterator[tuple[str, KLSpec, str]]:
        """Give each contradiction between the specs and the rest of the config."""
        from kl_plugins.adapters.verl.refusals import contradictions

        return contradictions(specs, config)

    def observation_of(self, config: Any) -> Observation | None:
        """Read what the config asks to observe, in either key."""
        from kl_plugins.adapters.verl.observe import observation_of

        found = observation_of(config)
        return None if found is None else found.observation

    def unobservable(self, config: Any) -> Iterator[tuple[str, Observation, str]]:
        """Give each reason why a run cannot be observed."""
        from kl_plugins.adapters.verl.observe import observation_of, problems

        found = observation_of(config)
        if found is not None:
            for problem in problems(found, config):
                yield f"{found.key}=", found.observation, problem

    def untested(self, config: Any) -> Iterator[str]:
        """Name the engines, kernels and trainers that the config picks and that the tests do not run."""
        from kl_plugins.adapters.verl.refusals import untested

        return untested(config)

    def further_findings(self, found: str) -> Iterator[Finding]:
        """Say whether veRL would import kl-plugins by itself."""
        yield _entry_finding() if Version(found) >= FIRST_WITH_ENTRY_POINTS else _module_finding()


def _module_finding() -> Finding:
    named = os.environ.get(MODULES, "").split(",")
    if ENTRY in (name.strip() for name in named):
        return Finding("ok", MODULES, ENTRY)
    return Finding(
        "fault",
        MODULES,
        "veRL before 0.9 looks for no entry points, so veRL imports no kl-plugins",
        f"set {MODULES}={ENTRY} (beside what it holds, with a comma) in every process, on every node",
    )


def _entry_finding() -> Finding:
    points = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not points:
        return Finding("fault", f"entry point {GROUP}", "veRL would not find kl-plugins", "reinstall kl-plugins")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and NAME not in (name.strip() for name in policy.split(",")):
        return Finding(
            "fault",
            "VERL_USE_EXTERNAL_PLUGINS",
            f"it is {policy!r}, so veRL imports no kl-plugins",
            f"unset it, or add {NAME} to it, in every process",
        )
    return Finding("ok", f"entry point {GROUP}", points[0].value)


ADAPTER = VerlAdapter(HOST)


def attach() -> None:
    """Put the hooks into veRL, now where it is imported and later where it is not. Safe to call twice."""
    ADAPTER.attach()


def detach() -> None:
    """Restore veRL's original functions. Safe to call twice. Specs are unknown estimators from then on."""
    ADAPTER.detach()


def diagnose() -> Sequence[Finding]:
    """Version, source and entry-point findings for ``kl-plugins doctor``; reads veRL's files, imports nothing of it."""
    return ADAPTER.diagnose()


def run(module: str, argv: Sequence[str]) -> int:
    """Run one of veRL's programs under the plugin: ``kl-plugins run verl.trainer.main_ppo KEY=VALUE...``.

    The hooks go into this process even if entry points are switched off. Workers get them through veRL's entry point.

    Args:
        module: for example ``verl.trainer.main_ppo``.
        argv: its arguments: veRL's own Hydra overrides.

    Returns:
        Exit status.
    """
    return ADAPTER.run(module, argv)


def require_receipts(worker_group: Any, spec: str) -> list[Receipt]:
    """Ask every worker of a veRL worker group for its receipt, and let it train under the spec.

    veRL's own trainers do this before the first update; other trainers have to call it.

    Args:
        worker_group: a ``RayWorkerGroup`` whose workers have their loss function.
        spec: the ``@loss`` spec that they should run, or a text with ``observe``.

    Raises:
        MissingReceiptError: a worker gave none, or runs something else; it is named.
    """
    from kl_plugins.adapters.base import parse
    from kl_plugins.adapters.verl.observe import observed_in
    from kl_plugins.adapters.verl.session import collect

    found = observed_in(LOSS_KEY, spec)
    return collect(worker_group, parse(spec)) if found is None else collect(worker_group, found.observation)
