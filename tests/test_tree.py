"""Readable paths, differences, descriptions, snapshots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Vars, tree

ARRAYS = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 2), max_size=2),
    st.sampled_from([np.float32, np.int32, np.bool_]),
)
TREES = st.recursive(
    ARRAYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc01", max_size=2), inner, max_size=3),
    ),
    max_leaves=6,
)


# flatten, path_name, map_with_path


@given(value=TREES)
@settings(max_examples=30, deadline=None)
def test_flatten_loses_no_leaf_and_can_be_undone(value):
    leaves, structure = tree.flatten(value)
    assert [id(leaf) for leaf in leaves.values()] == [id(leaf) for leaf in jax.tree.leaves(value)]
    assert jax.tree.structure(jax.tree.unflatten(structure, leaves.values())) == jax.tree.structure(value)


@given(value=TREES)
@settings(max_examples=30, deadline=None)
def test_map_with_path_gives_each_leaf_its_name(value):
    names = tree.map_with_path(lambda path, leaf: path, value)
    assert jax.tree.structure(names) == jax.tree.structure(value)
    assert jax.tree.leaves(names) == list(tree.flatten(value)[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Point:
    x: int
    y: int


def test_paths_are_keys_joined_by_dots():
    value = {
        "list": [{"weight": 1}, (2, None)],
        "vars": Vars(params={"bias": 3}, state=[], dtype=jnp.float32),
        "named": optax.TraceState(trace=4),
        "point": Point(5, 6),
    }
    assert tree.flatten(value)[0] == {
        "list.0.weight": 1,
        "list.1.0": 2,
        "named.trace": 4,
        "point.x": 5,
        "point.y": 6,
        "vars.params.bias": 3,
    }
    assert tree.flatten(7)[0] == {"": 7}


def test_path_name_of_nodes_registered_without_keys():
    @jax.tree_util.register_pytree_node_class
    class Pair:
        def __init__(self, *both):
            self.both = both

        def tree_flatten(self):
            return self.both, None

        @classmethod
        def tree_unflatten(cls, _, both):
            return cls(*both)

    assert tree.flatten({"a": Pair(1, 2)})[0] == {"a.0": 1, "a.1": 2}


@pytest.mark.parametrize("value", [{"a.b": 1, "a": {"b": 2}}, {"a.0": 1, "a": [2]}, [{"": [1]}, {".0": 2, "": [3]}]])
def test_two_leaves_of_one_name_are_an_error(value):
    with pytest.raises(ValueError, match=r"2 leaves have the same path, '.*': tree\[.*\] and tree\[.*\]. Rename"):
        tree.flatten(value)


# describe, is_array


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (jnp.zeros((3, 4)), "float32[3, 4]"),
        (np.zeros((), np.float64), "float64[]"),
        (np.zeros(2, ">f4"), "float32[2]"),
        (np.float32(1), "float32[]"),
        (jnp.zeros(2, jnp.bfloat16), "bfloat16[2]"),
        (jax.ShapeDtypeStruct((2,), jnp.int8), "int8[2]"),
        (jax.random.split(jax.random.key(0)), "key<fry>[2]"),
        (1.0, "float"),
        (True, "bool"),
        (None, "NoneType"),
        ("text", "str"),
        ([1], "list"),
    ],
    ids=str,
)
def test_describe(value, text):
    assert tree.describe(value) == text


def test_describe_and_is_array_of_traced_values():
    def traced(x):
        assert tree.describe(x) == "float32[3]"
        assert tree.is_array(x)
        return x

    jax.make_jaxpr(traced)(jnp.ones(3))


@pytest.mark.parametrize("value", [jnp.ones(2), np.ones(2), np.float32(1), np.bool_(True), jax.random.key(0)], ids=str)
def test_is_array(value):
    assert tree.is_array(value)


@pytest.mark.parametrize("value", [1, 1.0, True, None, [1.0], "x", jax.ShapeDtypeStruct((), jnp.float32)], ids=str)
def test_is_not_array(value):
    assert not tree.is_array(value)


# difference


@given(value=TREES)
@settings(max_examples=30, deadline=None)
def test_a_tree_differs_from_itself_in_nothing(value):
    assert tree.difference(value, value) == []
    assert tree.difference(value, jax.tree.map(jnp.asarray, value)) == []


@given(left=TREES, right=TREES)
@settings(max_examples=50, deadline=None)
def test_difference_names_exactly_the_leaves_that_differ(left, right):
    a, b = tree.flatten(left)[0], tree.flatten(right)[0]
    differ = {p for p in {*a, *b} if p not in a or p not in b or (a[p].shape, a[p].dtype) != (b[p].shape, b[p].dtype)}
    lines = tree.difference(left, right)
    assert len(lines) == len(differ)
    assert {line.split(": expected ")[0] for line in lines} == {p or "the tree" for p in differ}
    assert len(tree.difference(right, left)) == len(lines)


def test_difference_says_what_was_expected_and_what_was_found():
    expected = {"a": jnp.ones(2), "b": jnp.ones(3), "c": 1.0, "e": jnp.ones((3, 2))}
    found = {"a": jnp.ones(2, jnp.int32), "c": 1, "d": [np.ones(1)], "e": jnp.ones((2, 3))}
    assert tree.difference(expected, found) == [
        "b: expected float32[3], found nothing",
        "d.0: expected nothing, found float64[1]",
        "a: expected float32[2], found int32[2]",
        "c: expected float, found int",
        "e: expected float32[3, 2], found float32[2, 3]",
    ]


def test_difference_does_not_compare_containers():
    assert tree.difference([jnp.ones(1), jnp.ones(2)], (np.ones(1, np.float32), np.ones(2, np.float32))) == []


# snapshot


@pytest.mark.parametrize("layout", ["dense", "transposed", "strided", "view"])
def test_writes_after_a_snapshot_do_not_show(layout):
    base = np.arange(12.0).reshape(3, 4)
    array = {"dense": base, "transposed": base.T, "strided": base[:, ::2], "view": base[1:]}[layout]
    before = array.tobytes()
    taken = tree.snapshot(array)
    base[...] = -1
    assert array.tobytes() != before
    assert taken.tobytes() == before
    assert (taken.dtype, taken.shape) == (array.dtype, array.shape)


def test_writes_after_a_snapshot_do_not_reach_a_dispatched_step():
    step = jax.jit(lambda x: jnp.sin(x).sum())
    expected = step(np.ones(300_000, np.float32)).block_until_ready()
    array = np.ones(300_000, np.float32)
    result = step(tree.snapshot(array))
    array[:] = 5
    assert result == expected


@pytest.mark.parametrize("value", [jnp.ones(2), np.float32(1), 1.0, None, "x", (1, 2)], ids=str)
def test_what_cannot_change_is_its_own_snapshot(value):
    assert tree.snapshot(value) is value


def test_a_strong_leaf_is_a_jax_array_of_its_own_dtype():
    key = jax.random.key(0)
    assert tree.strong(key) is key
    assert not tree.strong(jnp.asarray(1.0)).weak_type and jnp.asarray(1.0).weak_type
    assert tree.strong(np.ones(2)).dtype == jnp.float32


def test_what_is_a_real_scalar():
    yes = [1, 2.0, True, np.float32(1), np.array(1), jnp.bfloat16(1), jnp.bool_(True), np.int8(3)]
    no = [None, "1", 1j, [1.0], np.ones(1), jnp.ones((1, 1)), jnp.complex64(1), np.array("a"), jax.random.key(0)]
    assert all(map(tree.is_real_scalar, yes)) and not any(map(tree.is_real_scalar, no))
    assert all(map(tree.is_real, [*yes, np.ones(1), jnp.ones((1, 1)), np.zeros((0, 2), bool)]))
    assert not any(map(tree.is_real, [None, "1", 1j, [1.0], jnp.complex64(1), np.array(["a"]), jax.random.key(0)]))


def test_what_is_a_key():
    assert tree.is_key(jax.random.key(0)) and tree.is_key(jax.random.split(jax.random.key(0, impl="rbg")))
    assert not any(map(tree.is_key, [jax.random.PRNGKey(0), np.zeros(2, np.uint32), 1, None]))
    assert jax.jit(lambda key: jnp.bool_(tree.is_key(key)))(jax.random.key(0))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1650, "1.65 KB"),
        (999_999, "1 MB"),
        (120_000_000, "120 MB"),
        (5_000_000_000_000, "5e+03 GB"),
    ],
)
def test_bytes_for_readers(count, text):
    assert tree.format_bytes(count) == text
