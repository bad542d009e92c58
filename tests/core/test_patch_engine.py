"""The patch engine on a module made for the purpose: hooks go in, are checked, and come out again."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.patches.engine.arguments import arguments, replaced
from kl_plugins.patches.engine.fingerprint import fingerprint_in_file
from kl_plugins.patches.engine.patch import Hook, Patch, PatchSet, hooked
from tests.support.core import toy_host


def double(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return 2 * wrapped(*args, **kwargs)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_host.write(tmp_path, monkeypatch)


@pytest.fixture
def toy(path: Path) -> Any:
    return importlib.import_module(path.stem)


def patch_set(path: Path, *names: str, supported: str = ">=0", digest: str = "", **changes: Any) -> PatchSet:
    known = digest or fingerprint_in_file(path, "Host.answer")
    assert known is not None
    names = names or ("Host.answer",)
    patches = tuple(Patch(path.stem, name, double, {"1.0": known}) for name in names)
    return PatchSet(toy_host.host(path.stem, supported), patches, **changes)


def test_apply_and_undo_restore_the_very_object(path: Path, toy: Any) -> None:
    before = vars(toy.Host)["answer"]
    patches = patch_set(path)
    patches.apply()
    patches.apply()
    assert patches.active
    assert toy.Host().answer(1) == 4
    patches.undo()
    patches.undo()
    assert not patches.active
    assert vars(toy.Host)["answer"] is before
    assert toy.Host().answer(1) == 2


def test_a_subclass_of_a_hooked_class_is_hooked_only_once(path: Path, toy: Any) -> None:
    in_place = patch_set(path)
    in_place.apply()
    sub: Any = type("Sub", (toy.Host,), {})
    on_sub = patch_set(path, owner=sub)
    on_sub.apply()
    assert (sub().answer(1), toy.Host().answer(1)) == (4, 4)
    on_sub.undo()
    in_place.undo()
    assert sub().answer(1) == 2


def test_a_subclass_is_hooked_alone_and_only_once(path: Path, toy: Any) -> None:
    sub: Any = type("Sub", (toy.Host,), {})
    on_sub, in_place = patch_set(path, owner=sub), patch_set(path)
    on_sub.apply()
    assert (sub().answer(1), toy.Host().answer(1)) == (4, 2)
    in_place.apply()
    assert (sub().answer(1), toy.Host().answer(1)) == (4, 4)
    assert hooked(sub, "answer")
    assert not hooked(sub, "other")
    on_sub.undo()
    in_place.undo()
    assert "answer" not in vars(sub)


def test_a_users_subclass_goes_through_the_hook(path: Path, toy: Any) -> None:
    patches = patch_set(path)
    patches.apply()

    class Mine(toy.Host):  # type: ignore[misc]
        def answer(self, x: int) -> Any:
            return super().answer(x) + 100

    assert Mine().answer(1) == 104
    patches.undo()


def test_a_method_called_through_its_class_gets_its_instance(path: Path, toy: Any) -> None:
    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return instance, args, wrapped(*args, **kwargs)

    patches = PatchSet(toy_host.host(path.stem), (Patch(path.stem, "Host.answer", wrapper),))
    patches.apply()
    one = toy.Host()
    assert toy.Host.answer(one, 1) == one.answer(1) == (one, (1,), 2)
    patches.undo()


def test_another_wrapper_on_top_is_not_thrown_away(path: Path, toy: Any) -> None:
    patches = patch_set(path)
    patches.apply()
    ours = toy.Host.answer
    toy.Host.answer = lambda self, x: ours(self, x)
    with pytest.raises(RuntimeError, match="wrapped again"):
        patches.undo()
    toy.Host.answer = ours
    patches.undo()
    assert not isinstance(inspect.getattr_static(toy.Host, "answer"), Hook)


def test_a_hook_is_pickled_by_reference(path: Path, toy: Any) -> None:
    patches = patch_set(path, "free", digest=str(fingerprint_in_file(path, "free")))
    patches.apply()
    text = pickle.dumps(toy.free)
    assert pickle.loads(text) is toy.free
    assert toy.free(4) == 6
    patches.undo()
    assert pickle.loads(text)(4) == 3  # a process without the hook gets the host's own function


def test_unknown_version_names_what_was_checked_and_what_was_found(path: Path) -> None:
    found = importlib.metadata.version("wrapt")
    with pytest.raises(UnsupportedHostError) as error:
        patch_set(path, supported="<0.1").apply()
    for part in (found, "<0.1", "KL_PLUGINS_ALLOW_UNTESTED"):
        assert part in str(error.value)


def test_changed_source_is_refused_and_nothing_is_applied(path: Path, toy: Any) -> None:
    patches = patch_set(path, "Host.answer", "Host.other")  # both with the digest of the first
    with pytest.raises(UnsupportedHostError, match=r"Host\.other"):
        patches.apply()
    assert toy.Host().answer(1) == 2


def test_override_warns_and_goes_on(path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KL_PLUGINS_ALLOW_UNTESTED", "1")
    patches = patch_set(path, digest="0" * 16)
    with pytest.warns(RuntimeWarning, match="KL_PLUGINS_ALLOW_UNTESTED=1"):
        patches.apply()
    assert toy.Host().answer(1) == 4
    patches.undo()


def test_absent_host() -> None:
    with pytest.raises(ModuleNotFoundError, match="no-such-host"):
        PatchSet(toy_host.host("toy", distribution="no-such-host"), ()).check()


def test_a_process_is_asked_only_about_modules_that_it_has_imported(path: Path) -> None:
    patches = patch_set(path, check_on_use=True)
    patches.check_imported()
    toy: Any = importlib.import_module(path.stem)
    with pytest.raises(UnsupportedHostError, match="has no hook in this process"):
        patches.check_imported()
    patches.apply()
    patches.check_imported()
    toy.Host.answer = lambda self, x: 0
    with pytest.raises(UnsupportedHostError, match="is not the code"):
        patches.check_imported()


def test_hooks_go_in_unchecked_where_they_are_checked_on_use(path: Path, toy: Any) -> None:
    patches = patch_set(path, digest="0" * 16, check_on_use=True)
    patches.apply()
    assert toy.Host().answer(1) == 4
    with pytest.raises(UnsupportedHostError, match=r"Host\.answer"):
        patches.check()
    patches.undo()


def test_a_summary_names_what_is_imported_and_follows_the_source(path: Path, tmp_path: Path) -> None:
    patches = patch_set(path, "Host.answer", "Host.other", check_on_use=True)
    assert patches.summary()[0] == ()
    importlib.import_module(path.stem)
    patches.apply()
    names, digest = patches.summary()
    assert names == ("Host.answer", "Host.other")
    assert patches.summary(functions=("Host.other",))[0] == ("Host.other",)
    assert patches.summary(modules=("another",))[0] == ()
    patches.undo()
    assert patches.summary() == (names, digest)
    assert patches.summary(functions=("Host.other",))[1] != digest


def function(first: int, second: int = 2, *, third: int = 3) -> None:
    """Stands for a function of a host."""


@pytest.mark.parametrize("call", [((1, 5), {}), ((1,), {"second": 5}), ((), {"first": 1, "second": 5})])
def test_arguments_by_name(call: tuple[Any, Any]) -> None:
    args, kwargs = call
    assert arguments(function, args, kwargs) == {"first": 1, "second": 5, "third": 3}
    args, kwargs = replaced(function, args, kwargs, second=7, third=8)
    assert arguments(function, args, kwargs) == {"first": 1, "second": 7, "third": 8}
