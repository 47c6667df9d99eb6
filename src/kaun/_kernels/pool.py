"""Max pooling whose gradient is cheap on XLA:CPU, and the windows that pooling reduces."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest_in_windows(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """The largest number of each window, for windows side by side.

    Its derivative picks by the place of that number. What JAX would derive puts the gradient back together from as
    many padded arrays as a window has numbers, which takes 2 to 5 times as long.
    """
    return _largest_and_where(x, window)[0]


def _derivative_of_largest(
    window: tuple[int, int], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y, where = _largest_and_where(primals[0], window)
    places = jnp.arange(math.prod(window), dtype=where.dtype).reshape(1, 1, window[0], 1, window[1], 1)
    picked = where[:, :, None, :, None] == places
    return y, jnp.where(picked, windows(windows(tangents[0], 2, window[1]), 1, window[0]), 0).sum((2, 4))


largest_in_windows.defjvp(_derivative_of_largest)


def _largest_and_where(x: jax.Array, window: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    split = windows(windows(x, 2, window[1]), 1, window[0])
    largest = split[:, :, 0, :, 0]
    where = jnp.zeros(largest.shape, jnp.int32)
    for place, (i, j) in enumerate(np.ndindex(window)):
        number = split[:, :, i, :, j]
        take = (number > largest) | jnp.isnan(number)
        largest, where = jnp.where(take, number, largest), jnp.where(take, place, where)
    return largest, where


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    # A select, not jnp.maximum: it hands the whole gradient to one of two equal numbers, the first.
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def taps(x: jax.Array, axis: int, window: int, step: int) -> list[jax.Array]:
    """The first number of each window along an axis, the second of each, and so on: ``window`` arrays.

    Reducing these, one axis after the other, instead of lax.reduce_window: XLA:CPU runs the gradient of the latter's
    maximum (select_and_scatter) 4 to 18 times slower on windows of 2 to 5, inside a loop as outside.
    """
    if window == step:
        split = windows(x, axis, window)
        return [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(window)]
    last = (x.shape[axis] - window) // step * step
    return [lax.slice_in_dim(x, i, i + last + 1, step, axis) for i in range(window)]


def windows(x: jax.Array, axis: int, window: int) -> jax.Array:
    """An axis split into windows side by side, ``[..., count, window, ...]``, the rest cut off."""
    count = x.shape[axis] // window
    x = lax.slice_in_dim(x, 0, count * window, axis=axis)
    return x.reshape(*x.shape[:axis], count, window, *x.shape[axis + 1 :])
