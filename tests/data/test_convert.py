"""What other libraries hand over becomes arrays. The real libraries are in tests/interop; here stand-ins of their shape."""

import collections
import dataclasses
from collections import UserDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun.data import convert, libraries


class Eager:
    """As a TensorFlow tensor: shape, dtype and numpy()."""

    def __init__(self, value):
        self.value = value
        self.shape, self.dtype = value.shape, value.dtype

    def numpy(self):
        return self.value


class Exchanged:
    """As an array of a library that has DLPack alone."""

    def __init__(self, value):
        self.value = jnp.asarray(value)

    def __dlpack__(self, **options):
        return self.value.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.value.__dlpack_device__()


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Any
    y: Any = None


LEAVES = st.sampled_from([1, 2.0, "a", None, b"b", np.ones(2), jnp.ones(2), np.float32(1), object()])
TENSORS = st.sampled_from([Eager(np.arange(3)), Exchanged(np.arange(3.0, dtype=np.float32))])


def trees(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
            st.tuples(inner, inner).map(lambda pair: Batch(*pair)),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(UserDict),
        ),
        max_leaves=6,
    )


@settings(max_examples=80, deadline=None)
@given(trees(LEAVES))
def test_a_tree_without_tensors_is_the_very_same_object(tree):
    assert convert.as_arrays(tree) is tree


def check(before, after):
    if isinstance(before, Eager):
        assert after is before.value
    elif isinstance(before, Exchanged):
        assert isinstance(after, jax.Array) and (after == before.value).all()
    elif isinstance(before, (dict, UserDict)):
        assert list(after) == list(before)
        for key in before:
            check(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        assert type(after) is type(before) and len(after) == len(before)
        for a, b in zip(before, after, strict=True):
            check(a, b)
    elif isinstance(before, Batch):
        assert type(after) is Batch
        check(before.x, after.x)
        check(before.y, after.y)
    else:
        assert after is before


@settings(max_examples=80, deadline=None)
@given(trees(st.one_of(LEAVES, TENSORS)))
def test_tensors_in_any_tree_become_arrays_and_nothing_else_changes(tree):
    check(tree, convert.as_arrays(tree))


def test_a_mapping_with_tensors_becomes_a_dict_which_jax_knows():
    encoding = UserDict(ids=Eager(np.ones(2)), text="abc")
    assert type(convert.as_arrays(encoding)) is dict
    assert type(convert.as_arrays(collections.OrderedDict(a=Eager(np.ones(2))))) is dict


def test_what_is_a_tensor():
    assert convert.is_tensor(Eager(np.ones(2))) and convert.is_tensor(Exchanged(np.ones(2, np.float32)))
    for other in (np.ones(2), jnp.ones(2), [Eager(np.ones(2))], 1.0, "a", np.ndarray):
        assert not convert.is_tensor(other)


def test_loaders_of_no_known_library_have_no_facts_and_no_workers():
    assert libraries.loader_facts([1, 2]) == {}
    libraries.refuse_forks([1, 2], "data")
