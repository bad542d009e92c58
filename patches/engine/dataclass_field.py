"""One new field in a host's dataclass, in place and undoable: config parsers then see it like the host's own."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import wrapt


@dataclasses.dataclass
class FieldPatch:
    """A field with a default that is added to a class whose ``__init__`` was already generated.

    Attributes:
        module: dotted path of the host's module.
        qualname: the dataclass in it.
        name: the new field.
        annotation: its type, as a parser should see it.
        default: its value where nothing is given.
        help: text for the host's command line.
    """

    module: str
    qualname: str
    name: str
    annotation: Any
    default: Any
    help: str
    _original_init: Any = dataclasses.field(default=None, init=False, repr=False)

    @property
    def active(self) -> bool:
        """Whether the field is in."""
        return self._original_init is not None

    def owner(self) -> Any:
        """The host's dataclass; imports its module."""
        return getattr(importlib.import_module(self.module), self.qualname)

    def apply(self) -> None:
        """Add the field. Safe to call twice. Subclasses that exist already do not get it.

        Raises:
            TypeError: the host has a field of that name.
        """
        if self.active:
            return
        owner = self.owner()
        if self.name in owner.__dataclass_fields__:
            raise TypeError(f"kl-plugins: {self.module}.{self.qualname} has a field {self.name!r} of its own")
        made = dataclasses.make_dataclass(
            "_Made",
            [(self.name, self.annotation, dataclasses.field(default=self.default, metadata={"help": self.help}))],
        )
        owner.__dataclass_fields__[self.name] = made.__dataclass_fields__[self.name]  # type: ignore[attr-defined]
        owner.__annotations__[self.name] = self.annotation
        setattr(owner, self.name, self.default)
        self._original_init = owner.__init__
        owner.__init__ = wrapt.FunctionWrapper(owner.__init__, self._init)

    def undo(self) -> None:
        """Take the field out again. Safe to call twice."""
        if not self.active:
            return
        owner = self.owner()
        owner.__init__ = self._original_init
        self._original_init = None
        del owner.__dataclass_fields__[self.name]
        del owner.__annotations__[self.name]
        delattr(owner, self.name)

    def _init(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Set before the generated __init__, which ends in __post_init__, where the value is checked.
        setattr(instance, self.name, kwargs.pop(self.name, self.default))
        wrapped(*args, **kwargs)
