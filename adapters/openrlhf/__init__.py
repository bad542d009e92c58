"""OpenRLHF under a KL spec: the spec goes into ``--algo.kl.estimator``, and nothing else changes.

``kl-plugins run openrlhf.cli.train_ppo_ray ...`` puts the hooks into the launching process and, through Ray, into every
worker. :func:`attach` is what Ray calls there. :func:`require_receipts` is for trainers that are not OpenRLHF's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kl_plugins.adapters.base import HostAdapter
from kl_plugins.hosts import Finding, Host

if TYPE_CHECKING:
    from kl_plugins.receipts import Receipt
    from kl_plugins.spec import KLSpec
    from kl_plugins.spec.observation import Observation

__all__ = ["attach", "detach", "diagnose", "require_receipts", "run"]

ESTIMATOR_FLAG = "--algo.kl.estimator"
LOSS_FLAG = "--algo.kl.use_loss"
COEFFICIENT_FLAG = "--algo.kl.init_coef"
"""OpenRLHF's settings that hold the spec, say whether it is a ``@loss`` spec, and hold beta."""

HOST = Host(
    name="openrlhf",
    title="OpenRLHF",
    distribution="openrlhf",
    packages=("openrlhf",),
    supported=">=0.10.2,<=0.11.2",
    tested=("0.11.2",),
    keys={
        "loss": f"{ESTIMATOR_FLAG}, with {LOSS_FLAG} (beta: {COEFFICIENT_FLAG})",
        "reward": f"{ESTIMATOR_FLAG}, without {LOSS_FLAG} (beta: {COEFFICIENT_FLAG})",
        "advantage": f"{ESTIMATOR_FLAG}, without {LOSS_FLAG} (beta: {COEFFICIENT_FLAG})",
    },
    module="kl_plugins.adapters.openrlhf",
    explainer="kl_plugins.adapters.openrlhf.explained",
    aggregation=(
        "@loss: token mean; @reward and @advantage by --actor.loss_agg_mode (token mean or sequence mean), and "
        "sequence mean under --actor.policy_loss_type gspo"
    ),
)

REMEDY = (
    "Install the same kl-plugins on every node, in the environment that Ray's workers run in, start the run with "
    "`kl-plugins run`, and start again."
)
"""What to do about a worker that has no receipt."""


class OpenRLHFAdapter(HostAdapter):
    """OpenRLHF for :class:`~kl_plugins.adapters.base.HostAdapter`; its settings are OpenRLHF's nested arguments."""

    def specs_of(self, config: Any) -> KLSpec | None:
        """Read the spec of the arguments; None for one of OpenRLHF's own estimators."""
        from kl_plugins.adapters.openrlhf.config import spec_of

        return spec_of(config)

    def refusals(self, specs: KLSpec, config: Any) -> Iterator[tuple[str, KLSpec, str]]:
        """Give each contradiction between the spec and the other arguments."""
        from kl_plugins.adapters.openrlhf.refusals import contradictions

        for problem in contradictions(specs, config):
            yield f"{ESTIMATOR_FLAG} ", specs, problem

    def observation_of(self, config: Any) -> Observation | None:
        """Read what the arguments ask to observe."""
        from kl_plugins.adapters.openrlhf.observe import observation_of

        return observation_of(config)

    def unobservable(self, config: Any) -> Iterator[tuple[str, Observation, str]]:
        """Give each reason why a run cannot be observed."""
        from kl_plugins.adapters.openrlhf.observe import observation_of, problems

        observation = observation_of(config)
        if observation is not None:
            for problem in problems(observation, config):
                yield f"{ESTIMATOR_FLAG} ", observation, problem

    def run(self, module: str, argv: Sequence[str]) -> int:
        """Run one of OpenRLHF's programs in this process, with the hooks here and in every Ray worker of its job."""
        if "." not in module:
            print(
                f"kl-plugins: {module!r} is no program; for example: kl-plugins run openrlhf.cli.train_ppo_ray "
                "--algo.kl.estimator k2@loss/is:token --algo.kl.use_loss ...",
                file=sys.stderr,
            )
            return 2
        from kl_plugins.adapters.openrlhf.launch import launching

        with launching():
            return super().run(module, argv)


ADAPTER = OpenRLHFAdapter(HOST)


def attach() -> None:
    """Put the hooks into OpenRLHF, now where it is imported and later where it is not. Safe to call twice."""
    ADAPTER.attach()


def detach() -> None:
    """Restore OpenRLHF's original functions. Safe to call twice. Specs are unknown estimators from then on."""
    ADAPTER.detach()


def diagnose() -> Sequence[Finding]:
    """Version and source findings for ``kl-plugins doctor``; reads OpenRLHF's files, imports nothing of it."""
    return ADAPTER.diagnose()


def run(module: str, argv: Sequence[str]) -> int:
    """Run one of OpenRLHF's programs under the plugin: ``kl-plugins run openrlhf.cli.train_ppo_ray ...``.

    Args:
        module: for example ``openrlhf.cli.train_ppo_ray``.
        argv: its arguments: OpenRLHF's own flags.

    Returns:
        Exit status.

    Raises:
        ValueError: the Ray job has a setup hook of its own.
    """
    return ADAPTER.run(module, argv)


def require_receipts(actor_group: Any, args: Any) -> list[Receipt]:
    """Ask every policy worker for its receipt, and let it train under the arguments' ``@loss`` spec or ``observe``.

    OpenRLHF's own trainers do this before the first rollout; other trainers have to call it.

    Args:
        actor_group: a ``RayActorGroup`` of policy workers that have their model; its size is the number of receipts
            expected.
        args: OpenRLHF's nested arguments.

    Returns:
        One receipt per worker; none where the arguments ask for no ``@loss`` spec and observe no KL in the loss.

    Raises:
        MissingReceiptError: a worker gave none, or runs something else; rank, pid and node are named.
    """
    from kl_plugins.adapters import receipts
    from kl_plugins.adapters.openrlhf.config import behaviour_source, spec_of
    from kl_plugins.adapters.openrlhf.observe import observation_of

    spec, observation = spec_of(args), observation_of(args)
    expected: KLSpec | Observation
    if observation is not None and args.algo.kl.use_loss:
        source, expected = behaviour_source(observation.measured, args), observation
    elif spec is not None and spec.placement == "loss":
        source, expected = behaviour_source(spec, args), spec
    else:
        return []
    import ray

    return receipts.collect(ray, actor_group._actor_handlers, HOST, expected, source, REMEDY)
