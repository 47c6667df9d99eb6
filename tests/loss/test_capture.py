"""Taking closures apart: what comes back behaves as the original, for anything that can be captured."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun._loss import capture
from kaun._loss.rebuild import Rebuilt
from kaun.errors import CaptureError

scalars = st.one_of(
    st.integers(-3, 3), st.booleans(), st.none(), st.text(max_size=2), st.floats(allow_nan=False), st.binary(max_size=2)
)
arrays = st.integers(0, 5).map(lambda i: np.full((2,), i, np.float32))
values = st.recursive(
    st.one_of(scalars, arrays, arrays.map(jnp.asarray)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
    ),
    max_leaves=8,
)


def same(a, b):
    """Equal in types, structure and contents."""
    if isinstance(a, (np.ndarray, jax.Array)):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def closing_over(value):
    return {
        "cell": lambda: lambda: value,
        "default": lambda: lambda value=value: value,
        "partial": lambda: functools.partial(lambda v: v, value),
        "nested": lambda: lambda: (lambda: value)(),
    }


@given(values, st.sampled_from(["cell", "default", "partial", "nested"]))
@settings(max_examples=200, deadline=None)
def test_what_is_put_together_gives_what_the_original_gave(value, way):
    function = closing_over(value)[way]()
    key, found = capture.capture_loss(function)
    hash(key)
    assert same(Rebuilt(key, found).function(), value)


@given(values, values)
@settings(max_examples=200, deadline=None)
def test_keys_are_equal_exactly_when_only_array_contents_differ(a, b):
    def skeleton(v):
        if isinstance(v, (np.ndarray, jax.Array)):
            return "array"
        if isinstance(v, (list, tuple)):
            return type(v).__name__, [skeleton(x) for x in v]
        if isinstance(v, dict):
            return "dict", [(k, skeleton(x)) for k, x in v.items()]
        return type(v).__name__, repr(v)

    make = lambda v: lambda: v
    keys = [capture.capture_loss(make(v))[0] for v in (a, b)]
    assert (keys[0] == keys[1]) == (skeleton(a) == skeleton(b))
    if keys[0] == keys[1]:
        assert hash(keys[0]) == hash(keys[1])


def test_self_referring_values_are_rebuilt():
    loop = [1]
    loop.append(loop)
    key, found = capture.capture_loss(lambda: loop)
    made = Rebuilt(key, found).function()
    assert made[0] == 1 and made[1] is made and made is not loop

    def factorial(n):
        return 1 if n == 0 else n * factorial(n - 1)

    key, found = capture.capture_loss(factorial)
    assert Rebuilt(key, found).function(5) == 120


def test_freeze_fixes_values_at_once():
    y = np.zeros(2)
    frozen = capture.snapshot_loss(lambda: y)
    y[:] = 7
    assert frozen().tolist() == [0.0, 0.0]
    assert capture.snapshot_loss(frozen) is frozen
    outer = lambda: frozen() + 1
    key, found = capture.capture_loss(outer)
    assert Rebuilt(key, found).function().tolist() == [1.0, 1.0]


def test_cells_that_are_not_filled_yet_stay_so():
    def make():
        def inner():
            return later

        key, found = capture.capture_loss(inner)
        later = 3
        return inner, Rebuilt(key, found).function

    inner, made = make()
    assert inner() == 3
    with pytest.raises(NameError, match=r"later"):
        made()


def test_bound_builtins_and_slices_and_sets():
    y = np.arange(4.0)
    parts = slice(1, 3), {1, 2}, frozenset("ab"), range(3)
    key, found = capture.capture_loss(lambda: (y.sum(), parts))
    total, rebuilt = Rebuilt(key, found).function()
    assert total == 6.0 and rebuilt == parts
    key, found = capture.capture_loss(lambda f=y.take: f([0, 1]))
    assert Rebuilt(key, found).function().tolist() == [0.0, 1.0]


class Link:
    next = None


def test_objects_nested_too_deeply_are_refused():
    first = link = Link()
    for _ in range(1100):
        link.next = Link()
        link = link.next
    with pytest.raises(CaptureError, match=r"captures `first`, values that are nested too deeply.*y = obj.y"):
        capture.capture_loss(lambda: first.next)


def test_a_global_that_is_refused_is_named():
    with pytest.raises(CaptureError, match=r"captures `words`, a NumPy array of dtype <U1"):
        capture.capture_loss(lambda: words)


words = np.array(["a"])
