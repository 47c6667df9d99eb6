"""What code reads and writes outside of itself."""

import types

import numpy as np
import optax
import pytest

import kaun.layers
from kaun._loss import code, origin
from kaun.errors import CaptureError

outside = 1


def reads_outside(out):
    def inner():
        return [outside for _ in range(3)], np.sum

    return inner, out.attribute, getattr(out, "by_name"), "not a name!"  # noqa: B009


def test_globals_and_names_of_nested_code_are_found():
    info = code.code_info(reads_outside)
    assert set(info.global_names) == {"outside", "range", "np", "getattr"}
    assert {"attribute", "by_name", "sum"} <= info.names and "not a name!" not in info.names
    assert code.code_info(reads_outside) is info
    assert info.stub.__code__ is reads_outside.__code__


def test_own_code_is_told_from_libraries():
    assert not code.code_info(reads_outside).library
    assert code.code_info(optax.adam).library and code.code_info(kaun.layers.linear).library
    assert code.code_info(types.FunctionType(types.new_class.__code__, vars(types))).library
    assert not origin.is_library(__name__) and origin.is_library("numpy") and origin.is_library("json")
    assert origin.is_library("kaun.layers.core") and not origin.is_library("kaunas")


def test_a_variable_of_the_functions_own_may_be_written_from_within():
    def fine(out):
        total = 0

        def add():
            nonlocal total
            total += 1

        add()
        return total

    assert code.code_info(fine).code is fine.__code__
    code.refuse_assignments(fine)


def test_deleting_counts_as_writing():
    box = 1

    def deletes(out):
        nonlocal box
        del box

    with pytest.raises(CaptureError, match="assigns to the nonlocal variable `box`"):
        code.refuse_assignments(deletes)


class Slots:
    __slots__ = ("a", "b")


class Thing:
    kind = 1

    def __init__(self):
        self.own = 2

    @property
    def computed(self):
        raise AssertionError("must not run")

    @staticmethod
    def static():
        pass


def test_attributes_are_read_without_running_the_objects_code():
    found = dict(code.attributes_of(Thing(), frozenset(["kind", "own", "computed", "static", "missing"])))
    assert found["kind"] == 1 and found["own"] == 2 and set(found) == {"kind", "own", "computed", "static"}
    assert found["computed"] is Thing.computed.fget and found["static"] is Thing.static
    slots = Slots()
    slots.a = 5
    assert code.attributes_of(slots, frozenset("ab")) == [("a", 5)]


def test_infos_are_bounded(monkeypatch):
    monkeypatch.setattr(code, "_MOST_INFOS", 3)
    monkeypatch.setattr(code, "_infos", {})
    for i in range(10):
        scope = {}
        exec(f"def f(): return {i}", scope)
        code.code_info(scope["f"])
    assert len(code._infos) == 3
