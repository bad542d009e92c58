"""Generic patch engine: a patch is data plus one wrapper function; ``apply``, ``check`` and ``undo`` are here.

It knows no host. ``kl_plugins.patches.<host>`` lists the patches, ``kl_plugins.adapters.<host>`` what they compute.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt
from packaging.specifiers import SpecifierSet

from kl_plugins.patches.fingerprint import fingerprint
from kl_plugins.patches.guards import check_source, check_version

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called as ``wrapper(wrapped, instance, args, kwargs)``; ``wrapped`` is bound."""

_MISSING: Any = object()


@dataclass(frozen=True)
class Patch:
    """Where one wrapper goes.

    Attributes:
        module: dotted path of the host's module.
        qualname: ``Class.method`` or ``function`` in it.
        wrapper: what runs instead; it gets the original as ``wrapped``.
        fingerprints: digest of the source it was written for, by the first host version that has it. Empty: the wrapper
            depends on nothing but the call signature, and the source is not looked at.
    """

    module: str
    qualname: str
    wrapper: Wrapper
    fingerprints: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def attribute(self) -> str:
        """Name of the attribute that is replaced."""
        return self.qualname.rpartition(".")[2]

    def owner(self) -> Any:
        """The host's class or module that holds the function; imports the module."""
        owner: Any = importlib.import_module(self.module)
        for name in self.qualname.split(".")[:-1]:
            owner = getattr(owner, name)
        return owner


if TYPE_CHECKING:
    _FunctionWrapper = wrapt.FunctionWrapper[..., Any]
else:
    _FunctionWrapper = wrapt.FunctionWrapper  # older releases take no type parameters


class Hook(_FunctionWrapper):
    """A wrapper that this engine put in; it remembers which patch it belongs to."""

    def __init__(self, wrapped: Callable[..., Any], patch: Patch) -> None:
        super().__init__(wrapped, patch.wrapper)
        self._self_patch = patch

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """The bound hook, or on the class the hook itself."""
        # Looked up on its class a plain function is itself; Ray and pickle rely on it.
        return self if instance is None else super().__get__(instance, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapper; a method called through its class gets its instance from the arguments."""
        patch: Patch = self._self_patch
        if args and "." in patch.qualname:
            return self.__get__(args[0], type(args[0]))(*args[1:], **kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By reference, as the function it stands for: a process without kl-plugins then gets the host's own.
        patch: Patch = self._self_patch
        return pkgutil.resolve_name, (f"{patch.module}:{patch.qualname}",)


@dataclass
class PatchSet:
    """The patches of one host, applied and undone together.

    Attributes:
        distribution: the host's name on the package index.
        supported: versions whose sources were checked.
        patches: what to wrap.
        owner: a subclass of the host's class to put the hooks on instead of the class itself; None = in place.
        check_on_use: hooks go in unchecked, because they pass everything through until the plugin is used, and whoever
            uses it calls :meth:`check` first. For hosts that import plugins in processes that may never use them.
    """

    distribution: str
    supported: SpecifierSet
    patches: Sequence[Patch]
    owner: type | None = None
    check_on_use: bool = False
    _applied: list[tuple[Patch, Any, Any, Hook]] = field(default_factory=list, init=False, repr=False)
    _deferred: bool = field(default=False, init=False, repr=False)

    @property
    def active(self) -> bool:
        """Whether any hook is in."""
        return bool(self._applied)

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the wrapped functions."""
        return tuple(patch.qualname for patch in self.patches)

    def apply(self) -> None:
        """Check every guard, then put every hook in; nothing is changed unless all guards hold. Safe to call twice.

        Raises:
            UnsupportedHostError: unknown version or changed source.
            ModuleNotFoundError: the host is not installed.
        """
        self._apply(self.patches)

    def apply_on_import(self) -> None:
        """Put the hooks of each module in as soon as the host imports it; now, where it has been imported already.

        The version is checked at once, sources on import.

        Raises:
            UnsupportedHostError: unknown version, or changed source of a module that is already imported.
        """
        if not self.check_on_use:
            check_version(self.distribution, self.supported)
        self._deferred = True
        for module in dict.fromkeys(patch.module for patch in self.patches):
            wrapt.register_post_import_hook(self._imported, module)

    def apply_to(self, module: str) -> None:
        """Put in the hooks of one module that has been imported. Safe to call twice.

        Raises:
            UnsupportedHostError: unknown version or changed source.
            AttributeError: the module lacks a function.
        """
        self._apply([patch for patch in self.patches if patch.module == module])

    def _imported(self, module: ModuleType) -> None:
        if self._deferred:
            self.apply_to(module.__name__)

    def _apply(self, patches: Sequence[Patch]) -> None:
        done = {patch for patch, *_ in self._applied}
        todo = [patch for patch in patches if patch not in done]
        if todo and not self.check_on_use:
            self.check(todo)
        for patch in todo:
            owner = self.owner or patch.owner()
            own, original = vars(owner).get(patch.attribute, _MISSING), _original(owner, patch.attribute)
            if isinstance(own, Hook) and isinstance(owner, ModuleType):
                own = original  # imported by name after that name was hooked at its home
            hook = self._hook_of(original, patch) or Hook(original, patch)
            setattr(owner, patch.attribute, hook)
            self._applied.append((patch, owner, own, hook))

    def _hook_of(self, original: Callable[..., Any], patch: Patch) -> Hook | None:
        # One hook for a function and for the names by which other modules imported it: pickle looks for identity.
        hooks = (hook for other, _, _, hook in self._applied if other.wrapper is patch.wrapper)
        return next((hook for hook in hooks if hook.__wrapped__ is original), None)

    def undo(self) -> None:
        """Put the original objects back. Safe to call twice.

        Raises:
            RuntimeError: somebody wrapped a hook again; undoing would remove theirs as well.
        """
        self._deferred = False
        for patch, owner, _, hook in self._applied:
            if vars(owner).get(patch.attribute) is not hook:
                raise RuntimeError(
                    f"kl-plugins: {patch.module}.{patch.qualname} was wrapped again after kl-plugins attached to it. "
                    "Undo that wrapper first, then detach."
                )
        while self._applied:
            patch, owner, own, _ = self._applied.pop()
            if own is _MISSING:
                delattr(owner, patch.attribute)
            else:
                setattr(owner, patch.attribute, own)

    def check(self, patches: Sequence[Patch] | None = None) -> None:
        """Raise unless the installed host is one that the patches were written for.

        Raises:
            UnsupportedHostError: unknown version or changed source.
        """
        version = check_version(self.distribution, self.supported)
        for patch in self.patches if patches is None else patches:
            function = _original(self.owner or patch.owner(), patch.attribute)
            name, host = f"{patch.module}.{patch.qualname}", f"{self.distribution} {version}"
            check_source(name, function, patch.fingerprints, host, self.supported)

    def fingerprint(self, patches: Sequence[Patch] | None = None) -> str:
        """Digest of all the sources that are wrapped, or of those of some patches, for receipts."""
        digest = hashlib.sha256()
        for patch in self.patches if patches is None else patches:
            if patch.fingerprints:
                digest.update(fingerprint(_original(self.owner or patch.owner(), patch.attribute)).encode())
        return digest.hexdigest()


def hooked(owner: type, attribute: str) -> bool:
    """Whether a class's attribute resolves to one of our hooks, that is, no subclass has overridden it."""
    return isinstance(inspect.getattr_static(owner, attribute, None), Hook)


def _original(owner: Any, attribute: str) -> Callable[..., Any]:
    """The host's own function behind an attribute, looking through our hooks: a subclass must not hook twice."""
    function = inspect.getattr_static(owner, attribute)
    while isinstance(function, Hook):
        function = function.__wrapped__
    return function  # type: ignore[no-any-return]
