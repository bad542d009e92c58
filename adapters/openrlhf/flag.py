"""The estimator flag: what it accepts beside OpenRLHF's own choices, and what ``--help`` says about it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from typing import Any

from kl_plugins.spec import KLSpec, KLSpecError, looks_like_spec

HELP = (
    "kl-plugins: or a KL spec, <estimator>@<placement>[/<option>[:<value>]]..., for example k2@loss/is:token, or a "
    "preset such as default; @loss needs --algo.kl.use_loss, @reward and @advantage forbid it. "
    "`kl-plugins explain SPEC` says which gradient it has, `kl-plugins list` what there is."
)


class Choices(Sequence[str]):
    """OpenRLHF's own estimators, and every spec."""

    def __init__(self, native: Sequence[str]) -> None:
        """Keep the host's list; it is what usage and errors show."""
        self.native = tuple(native)

    def __contains__(self, text: object) -> bool:
        return text in self.native or looks_like_spec(text)

    def __iter__(self) -> Iterator[str]:
        yield from self.native
        yield "a KL spec such as k2@loss"

    def __len__(self) -> int:
        return len(self.native) + 1

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def estimator(text: str) -> str:
    """Argparse's type of the flag: the text itself, once a spec in it has been found valid.

    Raises:
        ArgumentTypeError: the text is a bad spec; says which part, what was expected, the nearest valid word.
    """
    if looks_like_spec(text):
        try:
            KLSpec.parse(text)
        except KLSpecError as error:
            raise ArgumentTypeError(str(error)) from None
    return text


def extended(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the flag's ``add_argument``, with specs.

    Args:
        options: what OpenRLHF passes; needs ``choices``.
    """
    text = f"{options.get('help', '')} {HELP}".strip()
    metavar = "{" + ",".join([*options["choices"], "SPEC"]) + "}"
    return {**options, "type": estimator, "choices": Choices(options["choices"]), "help": text, "metavar": metavar}
