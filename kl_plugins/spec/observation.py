"""``observe`` and ``probe``: a KL setting that measures a spec and leaves the training of the host as it is.

The text is ``[<native>/]observe[:<spec>][/probe:<n>]``. ``native`` is the host's own word for its KL estimator, which
the host still gets. Hosts whose KL setting names no estimator have no such word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kl_plugins.spec import PRESETS, KLSpec
from kl_plugins.spec.errors import KLSpecError, nearest_word

OBSERVE, PROBE = "observe", "probe"

FORM = "[<the host's own word>/]observe[:<spec>][/probe:<n>], for example observe:k2@loss/is:token/probe:100"

_MARK = re.compile(r"(?:^|/)observe(?=$|[:/])")


def looks_like_observation(text: object) -> bool:
    """Return whether a host's KL setting asks to observe; the host's own words and specs do not."""
    return isinstance(text, str) and _MARK.search(text.strip()) is not None


@dataclass(frozen=True)
class Observation:
    """What a KL setting with ``observe`` asks for.

    Build it with :meth:`parse`; ``str()`` gives the canonical text.

    Attributes:
        native: the host's own word, which stands before ``observe``; None for the host's default.
        spec: the spec that is measured; None for the one that equals the host's own KL term.
        probe: number of optimizer steps (of rollouts, where the KL is in the reward) from one probe to the next; None
            for no probes.
        named: whether the user named the spec; otherwise the host's own settings decide it.
    """

    native: str | None = None
    spec: KLSpec | None = None
    probe: int | None = None
    named: bool = False

    @classmethod
    def parse(cls, text: str) -> Observation:
        """Read a text with ``observe``.

        A spec without a target, such as ``k1@loss``, needs no ``allow:biased`` here, because nothing trains under it.

        Args:
            text: ``[<native>/]observe[:<spec>][/probe:<n>]``.

        Returns:
            The observation; ``Observation.parse(str(observation)) == observation``.

        Raises:
            KLSpecError: the text is not valid. The error names the wrong part and what was expected.
        """
        text = text.strip()
        mark = _MARK.search(text)
        if mark is None:
            near = nearest_word(text.partition(":")[0], [OBSERVE])
            raise KLSpecError(text, 0, len(text), "no 'observe' in it", FORM, near)
        native = _native(text, mark) if text[: mark.end()] != OBSERVE else None
        rest, probe = _split_probe(text, mark.end())
        if not rest:
            return cls(native, None, probe)
        if not rest.startswith(":"):
            where = mark.end() + 1
            problem = f"{rest[1:]!r} after 'observe' belongs to no spec"
            raise KLSpecError(text, where, where + len(rest) - 1, problem, FORM)
        return cls(native, _spec(text, rest[1:], mark.end() + 1), probe, named=True)

    def of(self, spec: KLSpec) -> Observation:
        """Return the observation with the spec that equals the host's own KL term, if the user named none.

        Args:
            spec: that spec.
        """
        return self if self.named else replace(self, spec=spec)

    @property
    def measured(self) -> KLSpec:
        """The spec that is measured.

        Raises:
            ValueError: it is the host's own, which has not been looked up.
        """
        if self.spec is None:
            raise ValueError("the host's own KL term has not been looked up")
        return self.spec

    def probes(self, step: int) -> bool:
        """Return whether a step is followed by a probe.

        Args:
            step: the number of the step; the first one is 1.
        """
        return self.probe is not None and step > 0 and step % self.probe == 0

    def __str__(self) -> str:
        native = "" if self.native is None else f"{self.native}/"
        spec = f":{self.spec}" if self.named else ""
        return f"{native}{OBSERVE}{spec}" + ("" if self.probe is None else f"/{PROBE}:{self.probe}")


def _native(text: str, mark: re.Match[str]) -> str:
    word = text[: mark.start()]
    if not word or "@" in word or "/" in word or word in PRESETS:
        raise KLSpecError(
            text, 0, max(len(word), 1),
            f"{word!r} before 'observe' is not a host's own word: the host trains with it, and 'observe' is for runs "
            "that train with the host's own KL",
            FORM, f"observe:{word}" if word and not word.startswith("/") else None,
        )  # fmt: skip
    return word


def _split_probe(text: str, start: int) -> tuple[str, int | None]:
    """Return what stands between ``observe`` and ``/probe:<n>``, and n."""
    rest, slash, last = text[start:].rpartition("/")
    name, _, number = last.partition(":")
    if not slash or name != PROBE:
        return text[start:], None
    if not re.fullmatch(r"[0-9]+", number) or int(number) == 0:
        where = start + len(rest) + 1
        problem = f"probe:{number} is not a number of optimizer steps" if number else "probe without a number"
        raise KLSpecError(text, where, len(text), problem, "probe:<n> with a whole number n of at least 1")
    return rest, int(number)


def _spec(text: str, written: str, offset: int) -> KLSpec:
    from kl_plugins.spec.options import ALLOW_BIASED

    try:
        spec = KLSpec.parse(written)
    except KLSpecError as error:
        try:
            spec = KLSpec.parse(f"{written}/{ALLOW_BIASED}")
        except KLSpecError:
            start, end = error.start + offset, error.end + offset
            if text[start:end].partition(":")[0] == PROBE:
                problem = f"{text[start:end]!r} stands at the end, after the whole spec"
                raise KLSpecError(text, start, end, problem, FORM) from None
            raise KLSpecError(text, start, end, error.problem, error.expected, error.nearest) from None
    if spec.beta is not None:
        start = text.index("beta:", offset) if "beta:" in text else offset
        problem = "a beta: option has nothing to control, because the observed spec is not applied"
        raise KLSpecError(text, start, len(text), problem, "the spec without beta:")
    if spec.needs_exact and not (spec.estimator == "exact" and spec.placement == "loss" and spec.top is not None):
        problem = (
            "exact terms can be observed as exact@loss/top alone: all others would need logits that the host does not "
            "compute for its own KL"
        )
        expected = "exact@loss/top:<k>, for which the reference's own pass gives what is needed, or a sampled spec"
        raise KLSpecError(text, offset, offset + len(written), problem, expected, f"{OBSERVE}:exact@loss/top")
    return spec
