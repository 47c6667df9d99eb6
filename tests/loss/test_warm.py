"""A form that was captured before is captured again without a walk, to the same key and the same arrays."""

import collections
import functools
import gc
import statistics
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, losses
from kaun._loss import capture, capture_loss, rebuild_loss
from kaun.losses import cross_entropy_sparse

KAUN = str(Path(kaun.__file__).parent)


class Thing:
    shared = 1

    def __init__(self, value):
        self.value = value

    def give(self):
        return self.value, self.shared


scalars = st.one_of(
    st.sampled_from(
        [0, 1, 2, True, False, None, 0.0, -0.0, 1.0, 1j, "a", "b", b"a", float("nan"), (), range(2), len, np]
    ),
    st.integers(-1, 1),
)
arrays = st.integers(0, 3).map(lambda i: np.full((2,), i, np.float32))
values = st.recursive(
    st.one_of(scalars, arrays, arrays.map(jnp.asarray), st.just(np.float32(1)), st.just(slice(1, 2))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", 1, True]), inner, max_size=3),
        st.lists(inner, max_size=2).map(collections.deque),
        st.frozensets(st.sampled_from(["a", "b", 1]), max_size=2),
        inner.map(Thing),
        inner.map(lambda v: types.SimpleNamespace(value=v)),
        inner.map(lambda v: Thing(v).give),
        inner.map(lambda v: functools.partial(max, v, key=v)),
        inner.map(lambda v: [v, v]),
        inner.map(lambda v: lambda: v),
        inner.map(lambda v: collections.namedtuple("Pair", "left")(v)),
    ),
    max_leaves=6,
)


def closing(value):
    return lambda: (value, value.value, value.give())


def walked(loss):
    """The capture by a walk, whatever was captured before."""
    walk, key = capture._walked(loss)
    return key, walk.arrays


@given(st.lists(values, min_size=2, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_warm_capture_is_what_a_walk_gives(some):
    for value in [*some, *some]:
        loss = closing(value)
        key, found = capture_loss(loss)
        expected, wanted = walked(loss)
        assert key is expected
        assert len(found) == len(wanted)
        assert all(a is b or (np.ndim(a) == 0 and a == b) for a, b in zip(found, wanted, strict=True))


@given(values, values)
@settings(max_examples=150, deadline=None)
def test_a_value_that_changes_in_place_is_seen(before, after):
    thing = Thing(before)
    loss = lambda: thing.give()
    capture_loss(loss), capture_loss(loss)
    thing.value = after
    key, found = capture_loss(loss)
    expected, wanted = walked(loss)
    assert key is expected and all(a is b or np.ndim(a) == 0 for a, b in zip(found, wanted, strict=True))
    assert len(found) == len(wanted)


def plain(fresh):
    return lambda: fresh


CHANGES = {
    "cell": lambda: (types.SimpleNamespace(v=1), lambda n: setattr(n, "v", True)),
    "type": lambda: (types.SimpleNamespace(v=1), lambda n: setattr(n, "v", 1.0)),
    "zero": lambda: (types.SimpleNamespace(v=0.0), lambda n: setattr(n, "v", -0.0)),
    "dtype": lambda: (
        types.SimpleNamespace(v=np.zeros(1, np.float32)),
        lambda n: setattr(n, "v", np.array(["a"])[:0].astype(np.float64)),
    ),
    "longer": lambda: (types.SimpleNamespace(v=[1]), lambda n: n.v.append(2)),
    "another key": lambda: (types.SimpleNamespace(v={"a": 1}), lambda n: n.v.update({"b": n.v.pop("a")})),
    "order": lambda: (types.SimpleNamespace(v={"a": 1, "b": 1}), lambda n: n.v.update({"a": n.v.pop("a")})),
    "shared": lambda: (types.SimpleNamespace(v=[[1], [1]]), lambda n: n.v.__setitem__(1, n.v[0])),
    "gone": lambda: (types.SimpleNamespace(v=1), lambda n: delattr(n, "v")),
    "code": lambda: (types.SimpleNamespace(v=plain(1)), lambda n: setattr(n, "v", lambda: 1)),
    "set": lambda: (types.SimpleNamespace(v={"a"}), lambda n: n.v.add("b")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_noticed(change):
    held, apply = CHANGES[change]()
    loss = lambda: held.v
    first = [capture_loss(loss)[0] for _ in range(3)]
    assert first[0] is first[2]
    apply(held)
    key, _ = capture_loss(loss)
    assert key is walked(loss)[0]
    assert (key is first[0]) == (change == "dtype")


def test_a_class_that_changes_is_noticed(monkeypatch):
    class Local(Thing):
        pass

    loss = Local(1).give
    first = [capture_loss(loss)[0] for _ in range(3)][-1]
    Local.give = lambda self: 3
    assert capture_loss(Local(1).give)[0] is not first
    del Local.give
    assert capture_loss(Local(1).give)[0] is first
    Local.shared = 5
    assert capture_loss(Local(1).give)[0] is not first


def test_a_global_that_hides_a_built_in_function_is_noticed(monkeypatch):
    loss = lambda: abs(-1)
    first = [capture_loss(loss)[0] for _ in range(3)][-1]
    monkeypatch.setitem(globals(), "abs", lambda x: 7)
    key, arrays = capture_loss(loss)
    assert key is not first and rebuild_loss(key, arrays)() == 7


def test_an_iterator_is_not_taken_from():
    held = types.SimpleNamespace(v={"a": 1})
    loss = lambda: held.v
    capture_loss(loss), capture_loss(loss)
    held.v = iter(["a"])
    capture_loss(loss)
    assert next(held.v) == "a"


# What a capture costs

BATCH = (jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32))
WITH_LOSS = Data.from_items([BATCH] * 3).with_loss(cross_entropy_sparse)


class Objective:
    scale = 1.0

    def __init__(self, y):
        self.y, self.alpha = y, 1.0

    def loss(self, out):
        return losses.cross_entropy_sparse(out, self.y) * self.alpha * self.scale


CONFIG = Objective(None)


def by_cells():
    f, b = cross_entropy_sparse, BATCH
    return lambda out: f(out, b[1])


def by_global():
    y = BATCH[1]
    return lambda out: losses.cross_entropy_sparse(out, y)


def by_config():
    y = BATCH[1]
    return lambda out: losses.cross_entropy_sparse(out, y) * CONFIG.alpha


FORMS = {
    "cells": (by_cells, 2),
    "a global module": (by_global, 2),
    "with_loss": (lambda: next(iter(WITH_LOSS))[1], 2),
    "an object's attribute": (by_config, 2),
    "a method": (lambda: Objective(BATCH[1]).loss, 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_warm_capture_costs_two_calls(form):
    """Calls of Python functions of kaun for each item of each step."""
    make, most = FORMS[form]
    for _ in range(3):
        capture_loss(make())
    loss, calls = make(), []

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(KAUN):
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(count)
    try:
        capture_loss(loss)
    finally:
        sys.setprofile(None)
    assert len(calls) <= most, calls


def test_a_warm_capture_takes_microseconds():
    times = []
    for loss in [by_global() for _ in range(1000)]:
        start = time.perf_counter()
        capture_loss(loss)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 40e-6  # measured: 1.8


def test_forms_are_bounded(monkeypatch):
    monkeypatch.setattr(capture, "_MOST_CODES", 3)
    monkeypatch.setattr(capture, "_forms", {})
    for i in range(6):
        scope = {}
        exec(f"def f(): return {i}", scope)
        capture_loss(scope["f"])
    assert len(capture._forms) == 3
    for i in range(9):
        capture_loss(plain(i))
    assert max(len(forms) for _, forms in capture._forms.values()) == capture._MOST_FORMS


def test_a_plain_function_may_get_defaults_and_attributes_later():
    def loss(out, scale=1.0, *, shift=0.0):
        return (out * scale + shift + getattr(loss, "more", 0.0)).sum()

    keys = []
    for defaults, keywords, attributes in (
        (None, None, {}), ((2.0,), None, {}), (None, {"shift": 3.0}, {}), (None, None, {"more": 4.0}), (None, None, {}),
    ):  # fmt: skip
        loss.__defaults__, loss.__kwdefaults__, loss.__dict__ = defaults, keywords, attributes
        keys.append(capture_loss(loss)[0])
    assert keys[0] is keys[4] and len(set(keys[:4])) == 4


def test_forms_keep_nothing_alive():
    import weakref

    class Local(Thing):
        pass

    watched = weakref.ref(Local)
    capture_loss(Local(1).give), capture_loss(Local(jax.numpy.ones(2)).give)
    del Local
    gc.collect()
    assert watched() is None
