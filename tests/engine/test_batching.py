"""Blocks: what is stacked, what is passed once, and that it is the values of the moment at which an item came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Context
from kaun._engine.batching import BlockBuffer, capacity_of
from kaun._engine.inputs import StepInputs
from kaun.data.chunks import RowGather


def inputs_of(x):
    return StepInputs(x, None, None)


def block(*items, capacity=8):
    """The buffer that holds these items, each of which it must take."""
    buffer = BlockBuffer(inputs_of(items[0]), capacity)
    for item in items:
        assert buffer.add(inputs_of(item))
    return buffer


def test_equal_objects_are_passed_once_and_others_stacked():
    weights, x = np.ones(3, np.float32), [np.full(2, i, np.float32) for i in range(3)]
    buffer = block(*({"w": weights, "x": a} for a in x))
    assert buffer.varying == (False, True)
    (w,), (xs,) = buffer.arguments(buffer.varying)
    np.testing.assert_array_equal(w, weights)
    np.testing.assert_array_equal(xs[:3], x)
    assert xs.shape == (8, 2), "as long as the capacity, whatever the count"


def test_a_block_of_one_padded_batch_is_stacked_as_larger_ones_are():
    """Batches of buckets take turns: with another pattern the same step would be compiled a second time."""
    padded = lambda mask: StepInputs(np.ones((2, 3)), None, Context(row_mask=mask, scale=jnp.ones(())))
    buffer = BlockBuffer(padded(np.array([True, False])), 8)
    assert buffer.add(padded(np.array([True, False]))) and buffer.varying == (True, True, False)
    once, (x, mask) = buffer.arguments(buffer.varying)
    assert len(once) == 1 and mask[0].tolist() == [True, False] and (x[0] == 1).all()
    plain = StepInputs(np.ones((2, 3)), None, Context(row_mask=np.ones(3, bool)))  # not one for each row of x
    assert plain.row_mask is None and padded(np.ones(2, bool)).row_mask == 1
    assert BlockBuffer(plain, 8).add(plain) and block(np.ones((2, 3))).varying == (False,)


def test_an_array_written_to_between_two_items_is_another():
    a = np.zeros(2, np.float32)
    buffer = BlockBuffer(inputs_of(a), 8)
    for value in (0.0, -0.0, np.nan, np.nan):
        a[0] = value
        buffer.add(inputs_of(a))
    assert buffer.varying == (True,)
    a[:] = 99
    _, (xs,) = buffer.arguments((True,))
    assert xs[:4].tobytes() == np.array([[0, 0], [-0.0, 0], [np.nan, 0], [np.nan, 0]], np.float32).tobytes()


def test_a_large_array_written_to_is_another_too():
    a = np.zeros(5000, np.float32)
    buffer = block(a, a)
    assert buffer.varying == (False,)
    a[4999] = -0.0
    buffer.add(inputs_of(a))
    assert buffer.varying == (True,)


def test_what_is_the_same_can_be_stacked_all_the_same():
    weights = np.ones(3, np.float32)
    buffer = BlockBuffer(inputs_of(weights), 8)
    for value in (5, 6):  # buffers are used again, with what was in them before
        weights[:] = value
        for _ in range(3):
            buffer.add(inputs_of(weights))
        np.testing.assert_array_equal(buffer.arguments((True,))[1][0][:3], np.full((3, 3), value))


def test_what_is_passed_once_was_copied_when_it_came():
    a = np.zeros(2, np.float32)
    buffer = block(a)
    a[:] = 1
    assert buffer.arguments((False,))[0][0].tolist() == [0, 0]


def test_blocks_in_flight_keep_their_memory():
    buffer = BlockBuffer(inputs_of(np.zeros(2, np.float32)), 4)
    held = []
    for i in range(3):
        buffer.add(inputs_of(np.full(2, i, np.float32)))
        held.append(buffer.arguments((True,))[1][0])
    assert [a[0, 0] for a in held] == [0, 1, 2]


def test_jax_arrays_are_stacked_on_their_device():
    x = [jnp.full(2, i, jnp.float32) for i in range(3)]
    buffer = block(*x, capacity=40)
    _, (xs,) = buffer.arguments((True,))
    assert isinstance(xs, jax.Array) and xs.shape == (40, 2)
    np.testing.assert_array_equal(xs[:3], x)
    again = block(*([x[0]] * 3))
    assert again.varying == (False,) and again.arguments((False,))[0][0] is x[0]


def test_a_weak_type_is_not_stacked():
    one, two = jnp.asarray(1.0), jnp.asarray(2.0)
    assert one.weak_type
    buffer = block(one, one)
    assert not buffer.add(inputs_of(two))


@pytest.mark.parametrize(("one", "other"), [(1, 2), (0.0, -0.0), (1.5, 1.25), (True, False)])
def test_another_number_ends_the_block(one, other):
    buffer = block(one, one)
    assert not buffer.add(inputs_of(other)) and buffer.count == 2
    buffer.arguments((False,))
    assert buffer.add(inputs_of(other)), "an empty block takes any"


def test_nan_is_one_number():
    assert block(float("nan"), float("nan")).varying == (False,)


def test_another_shape_ends_the_block():
    assert not block(np.zeros(2)).add(inputs_of(np.zeros(3)))


def test_large_arrays_are_never_stacked():
    big = np.zeros((1 << 20) // 4 + 1, np.float32)
    assert capacity_of(inputs_of({"big": big, "small": np.zeros(2)})) == 128
    buffer = block(big, big)
    assert not buffer.add(inputs_of(big.copy()))
    big[0] = 1
    assert not buffer.add(inputs_of(big)), "nor the same one, written to"
    device = jnp.asarray(big)
    assert not block(device).add(inputs_of(device + 1))
    rows = {id(big): RowGather(np.zeros((4, len(big)), np.float32), slice(0, 4), 1)}
    assert buffer.room(rows, inputs_of(big)) == 1


@pytest.mark.parametrize(("shape", "items"), [((2,), 128), ((1 << 10, 32), 32), ((1 << 17, 2), 4), ((1 << 20,), 128)])
def test_the_capacity_is_bounded_by_items_and_bytes(shape, items):
    assert capacity_of(inputs_of(np.zeros(shape, np.float32))) == items


def test_a_run_fills_the_block_from_its_rows():
    rows = np.arange(20, dtype=np.float64).reshape(10, 2)
    first, weights = rows[0:2], np.ones(2)
    run = RowGather(rows, slice(0, 10), 2)
    buffer = BlockBuffer(inputs_of((first, weights)), 4)
    buffer.fill(inputs_of((first, weights)), {id(first): run}, 1, 3)
    (w,), (xs,) = buffer.arguments(buffer.varying)
    assert xs.dtype == np.float32 and w.dtype == np.float32
    np.testing.assert_array_equal(xs[:3].reshape(6, 2), rows[2:8])


def test_a_run_of_jax_arrays_is_gathered_on_the_device():
    rows = jnp.arange(20.0).reshape(10, 2)
    first = rows[0:2]
    buffer = BlockBuffer(inputs_of(first), 4)
    buffer.fill(inputs_of(first), {id(first): RowGather(rows, np.array([5, 4, 3, 2, 1, 0]), 2)}, 0, 3)
    _, (xs,) = buffer.arguments(buffer.varying)
    assert isinstance(xs, jax.Array) and xs.shape == (4, 2, 2)
    np.testing.assert_array_equal(xs[:3].reshape(6, 2), rows[np.array([5, 4, 3, 2, 1, 0])])


def test_an_item_alone_is_its_rows_whatever_the_item_shows():
    rows, shown = np.arange(20, dtype=np.float32).reshape(10, 2), np.zeros((2, 2), np.float32)
    buffer = BlockBuffer(inputs_of(shown), 4)
    for order in ([5, 4], [3, 0]):
        run = {id(shown): RowGather(rows, np.array(order), 2)}
        ((x,), nothing) = buffer.alone(inputs_of(shown), (False,), run)
        np.testing.assert_array_equal(x, rows[order])
        (no, (xs,)) = buffer.alone(inputs_of(shown), (True,), run)
        np.testing.assert_array_equal(xs[0], rows[order])
        assert not nothing and not no and x.ctypes.data % 64 == 0, "gathered into memory that XLA reads in place"
