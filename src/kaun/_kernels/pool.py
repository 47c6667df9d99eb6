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
    """Return the largest number of each window, for windows that do not overlap.

    Its gradient goes to the place of that number. JAX's own gradient adds as many padded arrays as a window has
    numbers, which takes 2 to 5 times as long.
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
    """Return the larger of two numbers, nan where one is."""
    # A select, not jnp.maximum: the whole gradient goes to the first of two equal numbers.
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def taps(x: jax.Array, axis: int, window: int, step: int) -> list[jax.Array]:
    """Return the first number of each window along an axis, the second of each, and so on: ``window`` arrays.

    Pooling reduces these, one axis after the other, and not lax.reduce_window: XLA:CPU runs the gradient of that one's
    maximum (select_and_scatter) 4 to 18 times slower on windows of 2 to 5, inside loops and outside.
    """
    if window == step:
        split = windows(x, axis, window)
        return [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(window)]
    last = (x.shape[axis] - window) // step * step
    return [lax.slice_in_dim(x, i, i + last + 1, step, axis) for i in range(window)]


def windows(x: jax.Array, axis: int, window: int) -> jax.Array:
    """Return an axis split into adjacent windows, ``[..., count, window, ...]``, without the rest."""
    count = x.shape[axis] // window
    x = lax.slice_in_dim(x, 0, count * window, axis=axis)
    return x.reshape(*x.shape[:axis], count, window, *x.shape[axis + 1 :])
