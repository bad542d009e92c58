"""Hooks in OpenRLHF's experience maker: ``@reward`` and ``@advantage``, and the check of a rollout's log-probs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from kl_plugins.adapters.openrlhf import score, settings
from kl_plugins.adapters.openrlhf.loss import check_rollout
from kl_plugins.adapters.openrlhf.score import ScoreBeta
from kl_plugins.adapters.receipts import announce
from kl_plugins.patches.arguments import Function, arguments
from kl_plugins.patches.openrlhf.cli import checked
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec, looks_like_spec


def init(wrapped: Function, maker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around ``__init__``: the checks where rewards are shaped; a score spec takes over the controller."""
    named = arguments(wrapped, args, kwargs)
    spec = checked(named["strategy"].args)
    wrapped(*args, **kwargs)
    if spec is not None and spec.placement != "loss":
        announce(_receipt(spec, maker.args))
        maker.kl_ctl = ScoreBeta(spec, maker.kl_ctl)


def _receipt(spec: KLSpec, args: Any) -> Receipt:
    from kl_plugins.patches.openrlhf.targets import MAKER, PATCHES

    used = [patch for patch in PATCHES.patches if patch.module == MAKER]
    return Receipt(
        rank=0,
        world_size=1,
        host="OpenRLHF",
        host_version=version("openrlhf"),
        patches=tuple(patch.qualname for patch in used),
        fingerprint=PATCHES.fingerprint(used),
        spec=str(spec),
        target=spec.target,
        behaviour="unused",
        reward_site=score.site(spec, args),
        aggregation=str(settings.aggregation_of(spec, args)),
        sampling=str(settings.sampling_of(args)),
        caveats=settings.caveats_of(spec, args),
    )


def make_experience(wrapped: Function, maker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the forward passes over a rollout batch, which end in the KL of each batch of samples."""
    spec = settings.spec_of(maker.args)
    if spec is None:
        return wrapped(*args, **kwargs)
    if spec.placement == "loss":
        made = wrapped(*args, **kwargs)
        check_rollout(spec, maker.args, made)
        return made
    control = _control(spec, maker)
    with score.shaping(control, arguments(wrapped, args, kwargs)["samples_list"]):
        return wrapped(*args, **kwargs)


def _control(spec: KLSpec, maker: Any) -> ScoreBeta:
    control = maker.kl_ctl
    if not isinstance(control, ScoreBeta):
        raise RuntimeError(
            f"kl-plugins: the experience maker's controller was replaced ({type(control).__qualname__}), so {spec} "
            "would not be applied; set it before the maker is built, or leave it alone"
        )
    return control


def approx_kl(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``compute_approx_kl`` by the name under which the experience maker calls it: a spec gets its penalty."""
    named = arguments(wrapped, args, kwargs)
    text = named["kl_estimator"]
    if not looks_like_spec(text):
        return wrapped(*args, **kwargs)
    found = score.next_samples()
    if found is None:
        raise RuntimeError(
            f"kl-plugins: {text} reached OpenRLHF's KL function from a place that kl-plugins does not know; a @reward "
            "or @advantage spec works in RemoteExperienceMaker.make_experience"
        )
    control, samples = found
    return control.penalise(samples, named["log_probs"], named["log_probs_base"])


def compute_advantages(wrapped: Function, maker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around rewards, advantages and their normalisation; ``@advantage`` is subtracted after all of it."""
    control = maker.kl_ctl
    if not (isinstance(control, ScoreBeta) and control.pending):
        return wrapped(*args, **kwargs)
    control.suppress_in_reward()
    experiences = wrapped(*args, **kwargs)
    control.subtract(experiences)
    return experiences
