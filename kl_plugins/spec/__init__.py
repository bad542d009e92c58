"""The KL spec: one string that names a KL regulariser, parsed, checked and explained without torch."""

from __future__ import annotations

from dataclasses import dataclass

from kl_plugins.controllers import BetaSchedule
from kl_plugins.spec.errors import KLSpecError
from kl_plugins.spec.grammar import DEFAULT_BOUND
from kl_plugins.spec.presets import PRESETS

__all__ = ["PRESETS", "BetaSchedule", "KLSpec", "KLSpecError", "looks_like_spec"]


def looks_like_spec(text: object) -> bool:
    """Return whether a host's KL setting is a spec of kl-plugins; a bare ``k2`` is the host's native value."""
    return isinstance(text, str) and ("@" in text or text.strip() in PRESETS)


@dataclass(frozen=True)
class KLSpec:
    """A parsed KL spec, which describes a KL regulariser completely.

    Build it with :meth:`parse`; ``str()`` gives the canonical text.

    Attributes:
        estimator: row of the estimator table (``k2``, ``alpha-0.5``, ``exact``).
        placement: ``loss``, ``reward`` or ``advantage``.
        horizon: ``token`` or ``sequence``; ``sequence`` adds the future-KL term. It is ``token`` for ``@reward``, where
            it has no meaning.
        future: estimator of the future term; None without a future term.
        gamma: discount of the future term, per response token.
        correction: the ``is:`` option, which is the importance weight on the KL term.
        behaviour: which log-probs are the behaviour policy's; None for the sampler's if they are given, else the old
            log-probs.
        floor, cap, band, norm: treatment of the weight, in this order.
        clip: half-width of the clipped KL head, or None.
        bound: largest absolute log-ratio that enters an ``exp``, nats.
        beta: schedule or controller of beta; None for the host's constant.
        top: number of the reference's most probable tokens that ``exact`` treats one by one; all others share a bucket.
            None for the whole vocabulary.
        draws: number of tokens that the reference draws from all others in each state; None for none.
        allow_biased: whether the user accepts that the target is ``none``.
    """

    estimator: str
    placement: str
    horizon: str = "token"
    future: str | None = None
    gamma: float = 1.0
    correction: str = "none"
    behaviour: str | None = None
    floor: float | None = None
    cap: float | None = None
    band: tuple[float, float] | None = None
    norm: bool = False
    clip: float | None = None
    bound: float = DEFAULT_BOUND
    beta: BetaSchedule | None = None
    top: int | None = None
    draws: int | None = None
    allow_biased: bool = False

    @classmethod
    def parse(cls, text: str) -> KLSpec:
        """Read a spec or the name of a preset.

        See ``docs/specs.md`` for the grammar.

        Args:
            text: ``<estimator>@<placement>[/<option>[:<value>]]...`` or a preset.

        Returns:
            The spec; ``KLSpec.parse(str(spec)) == spec``.

        Raises:
            KLSpecError: if the text is not a valid spec. The error names the wrong part, what was expected, and the
                nearest valid word.
        """
        from kl_plugins.spec.parse import parse_spec

        return parse_spec(text)

    @property
    def target(self) -> str:
        """Name of the gradient that the spec estimates in expectation, a key of ``kl_plugins.spec.target.TARGETS``."""
        from kl_plugins.spec.target import target_of

        return target_of(self)

    @property
    def caveats(self) -> tuple[str, ...]:
        """Reasons why the estimate can deviate from the target, one sentence each."""
        from kl_plugins.spec.target import caveats_of

        return caveats_of(self)

    @property
    def needs_behaviour(self) -> bool:
        """Return whether the KL term has an importance weight, so that behaviour log-probs are required."""
        return self.correction != "none" or self.clip is not None

    @property
    def needs_exact(self) -> bool:
        """Return whether full-vocabulary KL values are required in addition to the sampled log-probs."""
        return self.estimator == "exact" or self.future == "exact"

    def __str__(self) -> str:
        from kl_plugins.spec.options import OPTIONS

        return f"{self.estimator}@{self.placement}" + "".join(row.written(self) for row in OPTIONS.values())
