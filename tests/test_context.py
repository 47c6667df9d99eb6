"""Context: an immutable mapping, a pytree, and an error that lists what is there."""

import copy
import pickle
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Context
from kaun.errors import MissingContext

NAMES = st.text("abcd_", min_size=1, max_size=3)
VALUES = st.dictionaries(NAMES, st.integers(), max_size=5)


# The laws of a mapping


@given(values=VALUES)
@settings(max_examples=30, deadline=None)
def test_it_is_the_mapping_it_was_made_of(values):
    ctx = Context(values)
    assert isinstance(ctx, Mapping)
    assert dict(ctx) == dict(ctx.items()) == values == {name: ctx[name] for name in ctx}
    assert len(ctx) == len(values)
    assert all(name in ctx for name in values)
    assert "absent!" not in ctx
    assert ctx.get("absent!") is None
    assert ctx.get("absent!", 3) == 3
    assert ctx == Context(**values)
    assert list(ctx) == sorted(values)


@given(values=VALUES, name=NAMES, value=st.integers())
@settings(max_examples=30, deadline=None)
def test_set_changes_one_name_and_leaves_the_original(values, name, value):
    ctx = Context(values)
    after = ctx.set(name, value)
    assert dict(ctx) == values
    assert dict(after) == {**values, name: value}
    assert after.set(name, 0).set(name, value) == after


@given(a=VALUES, b=VALUES, c=VALUES)
@settings(max_examples=30, deadline=None)
def test_merge_is_associative_and_the_right_side_wins(a, b, c):
    a, b, c = Context(a), Context(b), Context(c)
    assert dict(a.merge(b)) == {**a, **b}
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(Context()) == a == Context().merge(a)
    assert a.merge(None) is a


def test_names_given_both_ways_the_keyword_wins():
    assert dict(Context({"a": 1, "b": 2}, b=3, values=4)) == {"a": 1, "b": 3, "values": 4}


def test_a_later_write_to_the_source_does_not_show():
    source = {"a": 1}
    ctx = Context(source)
    source["a"] = 2
    source["b"] = 3
    assert dict(ctx) == {"a": 1}


# A pytree


@given(values=VALUES)
@settings(max_examples=30, deadline=None)
def test_flattening_can_be_undone_whatever_the_order_of_names(values):
    ctx = Context(values)
    leaves, structure = jax.tree.flatten(ctx)
    assert jax.tree.unflatten(structure, leaves) == ctx
    assert jax.tree.structure(Context(dict(reversed(values.items())))) == structure
    assert leaves == [values[name] for name in sorted(values)]


def test_its_leaves_have_readable_paths():
    ctx = Context(mask=jnp.ones(2), nested={"a": [jnp.zeros(1)]})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ctx)]
    assert paths == ["['mask']", "['nested']['a'][0]"]


def test_through_jit_grad_and_vmap():
    traces = []

    @jax.jit
    def f(ctx):
        traces.append(list(ctx))
        return ctx.set("sum", ctx["a"] + ctx["b"])

    first = f(Context(a=jnp.float32(1), b=jnp.float32(2)))
    second = f(Context(b=jnp.float32(5), a=jnp.float32(4)))
    assert isinstance(first, Context)
    assert (float(first["sum"]), float(second["sum"])) == (3.0, 9.0)
    assert traces == [["a", "b"]]
    slope = jax.grad(lambda ctx: (ctx["a"] ** 2).sum())(Context(a=jnp.float32(3)))
    assert float(slope["a"]) == 6.0
    doubled = jax.vmap(lambda ctx: ctx["a"] * 2)(Context(a=jnp.arange(3.0)))
    np.testing.assert_array_equal(doubled, [0, 2, 4])


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda ctx: pickle.loads(pickle.dumps(ctx))])
def test_copies(through):
    ctx = Context(mask=np.arange(3), n=2)
    again = through(ctx)
    assert isinstance(again, Context)
    assert list(again) == ["mask", "n"]
    np.testing.assert_array_equal(again["mask"], ctx["mask"])


def test_dir_shows_what_a_user_calls():
    assert dir(Context(mask=np.arange(3))) == ["get", "items", "keys", "merge", "set", "values"]
    assert all(hasattr(Context(), name) for name in dir(Context()))


# Errors


def test_a_missing_name_lists_those_that_are_there():
    ctx = Context(segment=jnp.zeros(2), attention=jnp.zeros(2))
    with pytest.raises(MissingContext, match=r"no 'mask'; it has 'attention', 'segment'. Pass it as .*Context\(mask="):
        ctx["mask"]
    with pytest.raises(KeyError, match=r"no 'mask'; it has nothing"):
        Context()["mask"]


def test_it_cannot_be_changed():
    ctx = Context(a=1)
    with pytest.raises(AttributeError, match=r"Context is immutable: use ctx = ctx.set\('a', value\)"):
        ctx.a = 2
    with pytest.raises(AttributeError, match="immutable"):
        ctx._values = {}
    with pytest.raises(TypeError, match="does not support item assignment"):
        ctx["a"] = 2
    with pytest.raises(TypeError, match="unhashable"):
        hash(ctx)
    assert dict(ctx) == {"a": 1}


@pytest.mark.parametrize("make", [lambda: Context({1: 2}), lambda: Context(a=1).merge({None: 2})])
def test_names_are_strings(make):
    with pytest.raises(TypeError, match=r"Context names are strings, received (1|None). Write Context\(name=array\)"):
        make()


def test_repr_shows_shapes_not_numbers():
    assert repr(Context(mask=jnp.ones((2, 5), bool), n=3)) == "Context(mask=bool[2, 5], n=3)"
    assert repr(Context()) == "Context()"
