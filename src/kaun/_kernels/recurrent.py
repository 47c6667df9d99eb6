"""Recurrences over a sequence with a derivative that keeps its sums out of the loop over positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from kaun._kernels.matmul import matmul_tangent

__all__ = ["GRU", "LSTM", "RNN", "Cell", "recurrence"]

States = tuple[jax.Array, ...]


class Cell(NamedTuple):
    """What a recurrence computes at a position.

    Attributes:
        position: ``position(before, x, product) -> (after, slopes)``, of the states, what the input gives, and the
            product of the hidden state with the weight. ``slopes`` is what ``moved`` needs; the first of them has the
            shape of ``x``.
        moved: ``moved(slopes, before_dot, x_dot, product_dot) -> after_dot``, the derivative, linear in all but
            ``slopes``.
        sums: Whether ``x`` and ``product`` matter by their sum alone.
    """

    position: Callable[[States, jax.Array, jax.Array], tuple[States, Any]]
    moved: Callable[[Any, States, jax.Array, jax.Array], States]
    sums: bool


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def recurrence(
    cell: Cell, inputs: jax.Array, weight: jax.Array, bias: jax.Array, start: States, keep: jax.Array | None
) -> tuple[jax.Array, States]:
    """Return the hidden state at each position, and the states after the last one.

    JAX's own derivative of the loop adds to the gradients of weight and bias at each position. Here that is one product
    for all positions, on the fast kernel; what the derivative needs of the gates is computed inside the loop, where
    they are in the cache, and most of it takes the place of ``inputs`` in memory. An LSTM's training step took 1.15
    times the CPU time or more with a plain product, and with that computed for all positions at once (32 sequences of
    64 positions, 128 units, jax 0.10.2). All derivatives work.

    Args:
        cell: ``LSTM`` (Hochreiter and Schmidhuber, 1997), ``GRU`` (Cho et al., 2014, in the form of cuDNN) or ``RNN``
            (Elman, 1990).
        inputs: What the input gives at each position, ``[length, batch, gates * hidden]``, with the gates in PyTorch's
            order. Its dtype is that of the gates.
        weight: ``[hidden, gates * hidden]``. Its dtype is that of the product with the hidden state.
        bias: What is added to the product, ``[gates * hidden]``, in the dtype of the gates. For a cell with ``sums``
            that of the input may be in it, which saves a pass over ``inputs``.
        start: The states before the first position, each ``[batch, hidden]``, in the dtype of the gates: hidden and
            cell state of an LSTM, else the hidden state.
        keep: Whether a row moves at a position, bool ``[length, batch, 1]``; None where each does.

    Returns:
        ``[length, batch, hidden]`` and a tuple as ``start``, in the dtype of the gates.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun._kernels import LSTM, recurrence
        >>> zeros, inputs, weight = jnp.zeros((2, 3)), jnp.ones((5, 2, 12)), jnp.ones((3, 12))
        >>> y, (h, c) = recurrence(LSTM, inputs, weight, jnp.zeros(12), (zeros, zeros), None)
        >>> y.shape, c.shape, bool((y[-1] == h).all())
        ((5, 2, 3), (2, 3), True)
    """
    p = bias[None]

    def step(before: States, at: tuple[jax.Array, Any]) -> tuple[States, jax.Array]:
        after, _ = cell.position(before, at[0], _product(before, weight, p))
        after = _where(at[1], after, before)
        return after, after[0]

    end, y = lax.scan(step, start, (inputs, keep))
    return y, end


def _derivative(cell: Cell, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    inputs, weight, bias, start, keep = primals
    p = bias[None]

    # The slopes overwrite the inputs, position by position. A loop fills an array of its own with zeros first.
    def step(carried: tuple[States, jax.Array], at: tuple[jax.Array, Any]) -> tuple[Any, tuple[jax.Array, Any]]:
        (before, rows), (position, keep) = carried, at
        x = lax.dynamic_index_in_dim(rows, position, keepdims=False)
        after, (slope, *others) = cell.position(before, x, _product(before, weight, p))
        after = _where(keep, after, before)
        return (after, lax.dynamic_update_index_in_dim(rows, slope, position, 0)), (after[0], others)

    positions = lax.iota(jnp.uint32, len(inputs))
    (end, slopes), (y, others) = lax.scan(step, (start, inputs), (positions, keep))
    x_dot, weight_dot, bias_dot, start_dot, _ = tangents
    product_dot = jnp.broadcast_to(_instantiated(bias, bias_dot), inputs.shape)
    if not isinstance(weight_dot, SymbolicZero):
        earlier = jnp.concatenate([start[0][None], y[:-1]]).astype(weight.dtype)
        product_dot = product_dot + matmul_tangent(earlier, weight_dot).astype(inputs.dtype)
    x_dot, *start_dot = map(_instantiated, (inputs, *start), (x_dot, *start_dot))
    if cell.sums:
        x_dot, product_dot = x_dot + product_dot, None
    # The derivative of this product is one with a matrix in plain order: 0.77 of the time of one with its transpose.
    flipped = lax.optimization_barrier(weight.T)

    def moved(before: States, at: tuple[jax.Array, jax.Array | None, Any, Any]) -> tuple[States, jax.Array]:
        x_dot, product_dot, slopes, keep = at
        product = lax.dot_general(before[0].astype(weight.dtype), flipped, (((1,), (1,)), ((), ())))
        product = product.astype(inputs.dtype)
        product = product if product_dot is None else product + product_dot
        after = _where(keep, cell.moved(slopes, before, x_dot, product), before)
        return after, after[0]

    end_dot, y_dot = lax.scan(moved, tuple(start_dot), (x_dot, product_dot, (slopes, *others), keep))
    return (y, end), (y_dot, end_dot)


recurrence.defjvp(_derivative, symbolic_zeros=True)


def _product(states: States, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return (states[0].astype(weight.dtype) @ weight).astype(states[0].dtype) + bias


def _where(keep: jax.Array | None, after: States, before: States) -> States:
    return after if keep is None else tuple(jnp.where(keep, a, b) for a, b in zip(after, before, strict=True))


def _instantiated(primal: jax.Array, tangent: Any) -> jax.Array:
    return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent


def _lstm_position(before: States, x: jax.Array, product: jax.Array) -> tuple[States, Any]:
    c = before[1]
    i, f, g, o = jnp.split(_squashed(x + product), 4, axis=-1)
    after = f * c + i * g
    squashed = jnp.tanh(after)
    slopes = jnp.concatenate([i * (1 - i) * g, f * (1 - f) * c, i * (1 - g * g), o * (1 - o) * squashed], -1)
    return (o * squashed, after), (slopes, f, o * (1 - squashed * squashed))


def _squashed(gates: jax.Array) -> jax.Array:
    """The sigmoid of all gates but that of the cell, which has a tanh.

    One tanh for all takes a quarter of the time of separate functions on XLA:CPU.
    """
    # Made of an iota and not of a list, which would be a constant array of every program.
    gate = lax.broadcasted_iota(jnp.int32, (1, gates.shape[-1]), 1) // (gates.shape[-1] // 4)
    scale = jnp.where(gate == 2, 1.0, 0.5).astype(gates.dtype)
    return jnp.tanh(gates * scale) * scale + (1 - scale)


def _lstm_moved(slopes: Any, before: States, x: jax.Array, product: jax.Array) -> States:
    gates, f, through = slopes
    one, two, three, four = jnp.split((x + product) * gates, 4, axis=-1)
    c = f * before[1] + (one + two + three)
    return four + through * c, c


def _gru_position(before: States, x: jax.Array, product: jax.Array) -> tuple[States, Any]:
    (h,), width = before, before[0].shape[-1]
    both, new = x[..., : 2 * width] + product[..., : 2 * width], product[..., 2 * width :]
    r, z = jnp.split(jax.nn.sigmoid(both), 2, axis=-1)
    n = jnp.tanh(x[..., 2 * width :] + r * new)
    of_new = (1 - z) * (1 - n * n)
    slopes = jnp.concatenate([of_new * new * r * (1 - r), (h - n) * z * (1 - z), of_new], -1)
    return ((1 - z) * n + z * h,), (slopes, r, z)


def _gru_moved(slopes: Any, before: States, x: jax.Array, product: jax.Array) -> States:
    (gates, r, z), width = slopes, before[0].shape[-1]
    product = jnp.concatenate([product[..., : 2 * width], r * product[..., 2 * width :]], -1)
    one, two, three = jnp.split((x + product) * gates, 3, axis=-1)
    return (z * before[0] + (one + two + three),)


def _rnn_position(before: States, x: jax.Array, product: jax.Array) -> tuple[States, Any]:
    h = jnp.tanh(x + product)
    return (h,), (1 - h * h,)


def _rnn_moved(slopes: Any, before: States, x: jax.Array, product: jax.Array) -> States:
    return ((x + product) * slopes[0],)


LSTM = Cell(_lstm_position, _lstm_moved, sums=True)
GRU = Cell(_gru_position, _gru_moved, sums=False)
RNN = Cell(_rnn_position, _rnn_moved, sums=True)
