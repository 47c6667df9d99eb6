"""Chunks: several items as one are the same items that iterating gives, in number, order and bytes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Data, losses, rng
from kaun.data import chunks_of
from kaun.data.chunks import RowGather

X = np.arange(46, dtype=np.float32).reshape(23, 2)
Y = np.arange(23) * 10


def opened(data, limit):
    return chunks_of(data, iter(data), limit)


def expanded(data, limit):
    """All items of the chunks of a pipeline of arrays, each as a list of arrays."""
    items = []
    for item, n, rows in opened(data, limit):
        leaves = jax.tree_util.tree_leaves(item)
        for i in range(n):
            columns = []
            for leaf in leaves:
                if id(leaf) not in rows:
                    columns.append(np.asarray(leaf))
                elif isinstance(leaf, jax.Array):
                    columns.append(np.asarray(rows[id(leaf)].on_device(i, 1, 1)[0]))
                else:
                    out = np.empty((1, *leaf.shape), leaf.dtype)
                    rows[id(leaf)].into(out, i)
                    columns.append(out[0])
            items.append(columns)
    return items


STAGES = {
    "epochs": lambda data, n: data.epochs(n),
    "epoch": lambda data, n: data.epoch(n),
    "skip": lambda data, n: data.skip(n),
    "take": lambda data, n: data.take(n),
}


@given(
    st.sampled_from([(X, Y), X, {"x": jnp.asarray(X), "y": Y}, (X, Y, X[:, :0])]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(sorted(STAGES)), st.integers(0, 5)), max_size=4),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_chunks_are_the_items_of_the_pipeline(arrays, size, shuffle, drop_last, chain, limits):
    with rng.scope(1):
        data = Data.batches(arrays, size, shuffle=shuffle, drop_last=drop_last)
    for name, n in chain:
        data = STAGES[name](data, n)
    asked = itertools.cycle(limits)
    found = expanded(data, lambda left: min(left, next(asked)))
    expected = [[np.asarray(a) for a in jax.tree_util.tree_leaves(item)] for item in data]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [(a.dtype, a.shape, a.tobytes()) for a in one] == [(b.dtype, b.shape, b.tobytes()) for b in other]


def test_a_chunk_is_within_the_limit_which_is_asked_for_each():
    limits = iter([3, 1, 4, 2, 9])
    assert [n for _, n, _ in opened(Data.repeat(12, "item"), lambda left: min(left, next(limits)))] == [3, 1, 4, 2, 2]


def test_a_last_batch_that_is_smaller_comes_alone():
    data = Data.batches((X, Y), 5).epochs(2)
    assert [(len(item[0]), n) for item, n, _ in opened(data, lambda left: min(left, 100))] == [(5, 4), (3, 1)] * 2


def test_with_loss_keeps_chunks_and_a_function_of_the_users_does_not():
    batches = Data.batches((X, Y), 5)
    whole = lambda data: [n for _, n, _ in opened(data, lambda left: min(left, 100))]
    assert whole(batches.with_loss(losses.mse)) == [4, 1]
    assert whole(batches.map(lambda b: b)) == [1] * 5
    assert whole(batches.with_loss(losses.mse).prefetch(2)) == [1] * 5
    assert whole([1, 2, 3]) == [1] * 3


def test_an_item_that_is_refused_is_named():
    data = Data.batches(X, 5).with_loss(losses.mse)
    with pytest.raises(TypeError, match=r"with_loss expected items \(x, y\)") as caught:
        next(opened(data, lambda left: min(left, 3)))
    assert "item 0 (counted from 0)" in caught.value.__notes__[0]


@pytest.mark.parametrize("index", [slice(2, 20), np.array([3, 1, 4, 1, 5, 9, 2, 6])], ids=["in order", "shuffled"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_converted_where_the_buffer_is_of_another_dtype(index, dtype):
    rows = RowGather(X.astype(dtype), index, 2)
    out = np.full((3, 2, 2), -1, np.float32)
    rows.into(out, 1)
    flat = X[index][2:8]
    np.testing.assert_array_equal(out.reshape(6, 2), flat)


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_array_may_have_rows_without_columns(shuffle):
    # As a table without categories has, whose model reads its length.
    batches = Data.batches(({"numbers": X, "categories": np.zeros((23, 0), np.int32)}, Y), 5, shuffle=shuffle)
    items = expanded(batches, lambda left: min(left, 3))
    assert [[column.shape for column in item] for item in items[::4]] == [
        [(5, 0), (5, 2), (5,)],
        [(3, 0), (3, 2), (3,)],
    ]
    assert sorted(np.concatenate([item[2] for item in items]).tolist()) == Y.tolist()


def test_what_float32_cannot_hold_becomes_inf_without_a_warning():
    out = np.zeros((1, 1, 1), np.float32)
    RowGather(np.array([[1e300]]), np.array([0]), 1).into(out, 0)
    assert out[0, 0, 0] == np.inf
