"""A patch is data plus one wrapper function. This module applies patches, checks them and takes them out again."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from kl_plugins.adapters.versions import UnsupportedHostError, check_version, install_or_allow, refuse
from kl_plugins.hosts import Host
from kl_plugins.patches.engine.fingerprint import fingerprint

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


def checked_patch(
    checked: Mapping[str, Mapping[str, str]], home: str, qualname: str, wrapper: Wrapper, used_in: str = ""
) -> Patch:
    """Make a patch of a function at its home, or of the name by which another module has imported it.

    Args:
        checked: the fingerprints of a host, by ``module:qualname`` and version.
        home: module that defines the function.
        qualname: the function in it.
        wrapper: what runs instead.
        used_in: module whose name for the function is replaced; empty: the home.
    """
    return Patch(used_in or home, qualname, wrapper, checked.get(f"{home}:{qualname}", {}))


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
        """Return the bound hook, or on the class the hook itself."""
        # Looked up on its class, a plain function is itself. Ray and pickle rely on it.
        return self if instance is None else super().__get__(instance, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapper; a method called through its class gets its instance from the arguments."""
        patch: Patch = self._self_patch
        if args and "." in patch.qualname:
            return self.__get__(args[0], type(args[0]))(*args[1:], **kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickled by reference, like the function it stands for: a process without kl-plugins then gets the host's own.
        patch: Patch = self._self_patch
        return pkgutil.resolve_name, (f"{patch.module}:{patch.qualname}",)


@dataclass
class PatchSet:
    """The patches of one host, applied and undone together.

    Attributes:
        host: the host, with the versions whose sources were checked.
        patches: what to wrap.
        owner: a subclass of the host's class to put the hooks on instead of the class itself; None = in place.
        check_on_use: hooks go in unchecked. They pass everything through until a spec is used, and whoever uses one
            calls :meth:`check` first. For hosts that import plugins in processes that may never use them.
    """

    host: Host
    patches: Sequence[Patch]
    owner: type | None = None
    check_on_use: bool = False
    _applied: list[tuple[Patch, Any, Any, Hook]] = field(default_factory=list, init=False, repr=False)

    @property
    def active(self) -> bool:
        """Whether any hook is in."""
        return bool(self._applied)

    def apply(self, module: str | None = None) -> None:
        """Check every patch, then put every hook in; nothing is changed unless all checks pass. Safe to call twice.

        Args:
            module: put in the hooks of this module alone; None: of all.

        Raises:
            UnsupportedHostError: unknown version or changed source.
            ModuleNotFoundError: the host is not installed.
            AttributeError: a module lacks a function.
        """
        done = {patch for patch, *_ in self._applied}
        todo = [patch for patch in self.patches if patch not in done and module in (None, patch.module)]
        if todo and not self.check_on_use:
            self.check(todo)
        for patch in todo:
            owner = self.owner or patch.owner()
            own, original = vars(owner).get(patch.attribute, _MISSING), _original(owner, patch.attribute)
            if isinstance(own, Hook) and isinstance(owner, ModuleType):
                own = original  # the name was imported after the function was hooked at its home
            hook = self._hook_of(original, patch) or Hook(original, patch)
            setattr(owner, patch.attribute, hook)
            self._applied.append((patch, owner, own, hook))

    def _hook_of(self, original: Callable[..., Any], patch: Patch) -> Hook | None:
        # A function and the names by which other modules imported it share one hook, because pickle compares identity.
        hooks = (hook for other, _, _, hook in self._applied if other.wrapper is patch.wrapper)
        return next((hook for hook in hooks if hook.__wrapped__ is original), None)

    def undo(self) -> None:
        """Put the original objects back. Safe to call twice.

        Raises:
            RuntimeError: another package wrapped a hook; undoing would remove its wrapper as well.
        """
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
        version = check_version(self.host.distribution, self.host.supported)
        for patch in self.patches if patches is None else patches:
            if not patch.fingerprints:
                continue
            try:
                found = fingerprint(_original(self.owner or patch.owner(), patch.attribute))
            except (OSError, TypeError) as error:
                found = f"unreadable ({error})"
            if found not in patch.fingerprints.values():
                refuse(
                    f"{patch.module}.{patch.qualname} of {self.host.distribution} {version} is not the code that "
                    f"kl-plugins was checked with (fingerprint {found}); it was edited, or another package has "
                    "replaced it",
                    install_or_allow(self.host.supported),
                )

    def check_imported(self) -> None:
        """Raise unless every hook on a module that this process has imported is in, on a checked host.

        Raises:
            UnsupportedHostError: unknown version, changed source, or a hook that is not in.
        """
        imported = [patch for patch in self.patches if patch.module in sys.modules]
        self.check(imported)
        for patch in imported:
            if not isinstance(vars(patch.owner()).get(patch.attribute), Hook):
                raise UnsupportedHostError(
                    f"kl-plugins: {patch.module}.{patch.qualname} has no hook in this process: something replaced it, "
                    "or kl-plugins was detached. A KL spec would have no effect there"
                )

    def summary(self, modules: Collection[str] = (), functions: Collection[str] = ()) -> tuple[tuple[str, ...], str]:
        """Name the wrapped functions, and give one digest of their sources, for a receipt.

        Args:
            modules: only patches in these modules; empty: in all.
            functions: only patches of these functions; empty: of all.

        Returns:
            Qualified names, each once, and the digest.
        """
        used = [
            patch
            for patch in self.patches
            if (not modules or patch.module in modules)
            and (not functions or patch.qualname in functions)
            and patch.module in sys.modules  # other trainers' modules need not be there
        ]
        digest = hashlib.sha256()
        for patch in used:
            if patch.fingerprints:
                digest.update(fingerprint(_original(self.owner or patch.owner(), patch.attribute)).encode())
        return tuple(dict.fromkeys(patch.qualname for patch in used)), digest.hexdigest()


def hooked(owner: type, attribute: str) -> bool:
    """Whether a class's attribute resolves to one of our hooks, that is, no subclass has overridden it."""
    return isinstance(inspect.getattr_static(owner, attribute, None), Hook)


def _original(owner: Any, attribute: str) -> Callable[..., Any]:
    """Return the host's own function behind an attribute, without our hooks, so that none is put in twice."""
    function = inspect.getattr_static(owner, attribute)
    while isinstance(function, Hook):
        function = function.__wrapped__
    return function  # type: ignore[no-any-return]
