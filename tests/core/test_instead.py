"""A method of one object that is replaced for a while."""

import pytest

from kl_plugins.patches.engine.instead import instead


class Base:
    def name(self):
        return "base"


class Child(Base):
    def name(self):
        return "child"


def other():
    return "other"


def test_a_method_is_replaced_on_one_object_and_only_within_the_block():
    first, second = Child(), Child()
    with instead(first, "name", other):
        assert (first.name(), second.name()) == ("other", "child")
    assert first.name() == "child"
    assert not vars(first)


def test_a_function_that_the_object_held_is_put_back():
    held = Base()
    held.name = lambda: "held"
    with instead(held, "name", other), instead(held, "name", lambda: "inner"):
        assert held.name() == "inner"
    assert held.name() == "held"


def test_a_held_none_is_put_back():
    held = Base()
    held.name = None
    with instead(held, "name", other):
        assert held.name() == "other"
    assert held.name is None


def test_an_error_ends_the_replacement():
    replaced = Base()
    with pytest.raises(ValueError, match="stop"), instead(replaced, "name", other):
        raise ValueError("stop")
    assert replaced.name() == "base"
