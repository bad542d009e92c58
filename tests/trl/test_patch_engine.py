"""The patch engine, on a module made for the purpose: it knows no host."""

import importlib.metadata
import inspect
import sys
import textwrap
import warnings

import pytest
from packaging.specifiers import SpecifierSet

from kl_plugins.patches.fingerprint import fingerprint, fingerprint_in_file
from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.patches.engine.patch import Hook, Patch, PatchSet, hooked

SOURCE = """
class Host:
    def answer(self, x):
        '''What the host computes.'''
        return x + 1

    def other(self):
        return 0
"""
ANY = SpecifierSet(">=0")


def double(wrapped, instance, args, kwargs):
    return 2 * wrapped(*args, **kwargs)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A module on disk; its 'distribution' is one that is installed."""
    (tmp_path / "toy_host.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "toy_host.py"
    sys.modules.pop("toy_host", None)


def patch_set(host, supported=ANY, source=None, owner=None):
    digest = fingerprint_in_file(host, "Host.answer") if source is None else source
    return PatchSet("wrapt", supported, (Patch("toy_host", "Host.answer", double, {"1.0": digest}),), owner)


def test_apply_and_undo_restore_the_very_object(host):
    import toy_host

    before = toy_host.Host.__dict__["answer"]
    patches = patch_set(host)
    patches.apply()
    patches.apply()
    assert toy_host.Host().answer(1) == 4
    patches.undo()
    patches.undo()
    assert toy_host.Host.__dict__["answer"] is before
    assert toy_host.Host().answer(1) == 2


def test_a_subclass_is_hooked_alone_and_only_once(host):
    import toy_host

    sub = type("Sub", (toy_host.Host,), {})
    on_sub, in_place = patch_set(host, owner=sub), patch_set(host)
    on_sub.apply()
    assert (sub().answer(1), toy_host.Host().answer(1)) == (4, 2)
    in_place.apply()
    assert (sub().answer(1), toy_host.Host().answer(1)) == (4, 4)
    assert hooked(sub, "answer")
    assert not hooked(sub, "other")
    on_sub.undo()
    in_place.undo()
    assert "answer" not in vars(sub)


def test_a_users_subclass_goes_through_the_hook(host):
    import toy_host

    patches = patch_set(host)
    patches.apply()

    class Mine(toy_host.Host):
        def answer(self, x):
            return super().answer(x) + 100

    assert Mine().answer(1) == 104
    patches.undo()


def test_another_wrapper_on_top_is_not_thrown_away(host):
    import toy_host

    patches = patch_set(host)
    patches.apply()
    ours = toy_host.Host.answer
    toy_host.Host.answer = lambda self, x: ours(self, x)
    with pytest.raises(RuntimeError, match="wrapped again"):
        patches.undo()
    toy_host.Host.answer = patches._applied[0][3]
    patches.undo()
    assert not isinstance(inspect.getattr_static(toy_host.Host, "answer"), Hook)


def test_unknown_version_names_what_was_checked_and_what_was_found(host):
    found = importlib.metadata.version("wrapt")
    with pytest.raises(UnsupportedHostError) as error:
        patch_set(host, SpecifierSet("<0.1")).apply()
    for part in (found, "<0.1", "KL_PLUGINS_ALLOW_UNTESTED"):
        assert part in str(error.value)


def test_changed_source_is_refused_and_nothing_is_applied(host):
    import toy_host

    known = fingerprint_in_file(host, "Host.answer")
    patches = PatchSet(
        "wrapt",
        ANY,
        (
            Patch("toy_host", "Host.answer", double, {"1": known}),
            Patch("toy_host", "Host.other", double, {"1": "0" * 16}),
        ),
    )
    with pytest.raises(UnsupportedHostError, match=r"Host\.other"):
        patches.apply()
    assert toy_host.Host().answer(1) == 2


def test_override_warns_and_goes_on(host, monkeypatch):
    import toy_host

    monkeypatch.setenv("KL_PLUGINS_ALLOW_UNTESTED", "1")
    patches = patch_set(host, source="0" * 16)
    with pytest.warns(RuntimeWarning, match="KL_PLUGINS_ALLOW_UNTESTED=1"):
        patches.apply()
    assert toy_host.Host().answer(1) == 4
    patches.undo()


def test_absent_host(host):
    with pytest.raises(ModuleNotFoundError, match="no-such-host"):
        PatchSet("no-such-host", ANY, ()).check()


def test_post_import_hook_waits_for_the_module(host):
    patches = patch_set(host)
    patches.apply_on_import()
    assert not patches.active
    import toy_host

    assert toy_host.Host().answer(1) == 4
    patches.undo()
    assert toy_host.Host().answer(1) == 2


def test_undo_before_the_import_leaves_the_host_alone(host):
    patches = patch_set(host)
    patches.apply_on_import()
    patches.undo()
    import toy_host

    assert toy_host.Host().answer(1) == 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("return x + 1", "return x + 1  # a comment"), True),
        (("What the host computes.", "Other words."), True),
        (("(self, x)", "(self, x: int) -> int"), True),
        (("return x + 1", "return (x\n            + 1)"), True),
        (("x + 1", "x + 2"), False),
        (("x + 1", "x - 1"), False),
        (("(self, x)", "(self, x=0)"), False),
    ],
)
def test_fingerprint_follows_code_not_layout(change, same, tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text(SOURCE)
    second.write_text(SOURCE.replace(*change))
    digests = {fingerprint_in_file(path, "Host.answer") for path in (first, second)}
    assert len(digests) == (1 if same else 2)


def test_fingerprint_of_a_function_is_that_of_its_file(host):
    import toy_host

    assert fingerprint(toy_host.Host.answer) == fingerprint_in_file(host, "Host.answer")
    assert fingerprint_in_file(host, "Host.absent") is None


def test_fingerprint_does_not_depend_on_the_python_version(tmp_path):
    # The table of host fingerprints is shared by all of them.
    path = tmp_path / "f.py"
    path.write_text(
        textwrap.dedent("def f(a, *, b=f'{1}x', **k):\n    return [a[1:2, ...] for _ in k if b] or {**k}\n")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fingerprint_in_file(path, "f") == "99533f53da58c860"
