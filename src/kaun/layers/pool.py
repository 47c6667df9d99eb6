"""Pooling of images, and ``flatten``, which turns what is left into vectors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun.layers.checks import float_input, here
from kaun.layers.core import Float, Layer, stateless
from kaun.layers.parts import pair, spell, wide

__all__ = ["avg_pool2d", "flatten", "max_pool2d"]


def max_pool2d(kernel_size: int | Sequence[int], stride: int | Sequence[int] | None = None) -> Layer[Float, Float]:
    """The layer that gives the largest number of each window of an image, channel by channel.

    Input ``[batch, height, width, channels]`` of any floating dtype, output ``[batch, height', width', channels]`` in
    the same, with ``height' = (height - kernel height) // stride + 1``: nothing is padded, what does not fill a window
    is left out. Where several numbers of a window are largest, the gradient goes to the first of them (by rows), as in
    PyTorch and XLA. NaN in a window gives NaN.

    Arguments:
        kernel_size: the window, an int or ``(height, width)``.
        stride: step between windows, likewise; default the window itself.

    Raises:
        TypeError: a size is not an int; applied, not a floating array.
        ValueError: a size below 1; applied, not four axes, or an image smaller than the window.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> layer = layers.max_pool2d(2)
    >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.arange(16.0).reshape(1, 4, 4, 1))
    >>> y.reshape(2, 2)
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    window, step = _sizes("max_pool2d", kernel_size, stride)
    name = spell(max_pool2d, kernel_size=kernel_size, stride=stride)

    def largest(x: jax.Array, axis: int) -> jax.Array:
        return functools.reduce(_larger, _taps(x, axis, window[axis - 1], step[axis - 1]))

    if window == step and math.prod(window) <= 16:
        return _pool(name, window, lambda x: _largest(x, window))
    return _pool(name, window, lambda x: largest(largest(x, 2), 1))


def avg_pool2d(kernel_size: int | Sequence[int], stride: int | Sequence[int] | None = None) -> Layer[Float, Float]:
    """The layer that gives the mean of each window of an image, channel by channel.

    Input ``[batch, height, width, channels]`` of any floating dtype, output ``[batch, height', width', channels]`` in
    the same, with ``height' = (height - kernel height) // stride + 1``: nothing is padded, what does not fill a window
    is left out. Sums are taken in float32 in half precision.

    Arguments:
        kernel_size: the window, an int or ``(height, width)``.
        stride: step between windows, likewise; default the window itself.

    Raises:
        TypeError: a size is not an int; applied, not a floating array.
        ValueError: a size below 1; applied, not four axes, or an image smaller than the window.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> layer = layers.avg_pool2d((2, 4))
    >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.arange(16.0).reshape(1, 4, 4, 1))
    >>> y.reshape(2)
    Array([ 3.5, 11.5], dtype=float32)
    """
    window, step = _sizes("avg_pool2d", kernel_size, stride)
    name = spell(avg_pool2d, kernel_size=kernel_size, stride=stride)

    def mean(x: jax.Array, axis: int) -> jax.Array:
        if window[axis - 1] == step[axis - 1]:
            return _windows(x, axis, window[axis - 1]).mean(axis + 1)
        return functools.reduce(operator.add, _taps(x, axis, window[axis - 1], step[axis - 1])) / window[axis - 1]

    return _pool(name, window, lambda x: mean(mean(x.astype(wide(x.dtype)), 2), 1))


def flatten() -> Layer[Float, Float]:
    """The layer that makes one vector of each item: ``[batch, ...]`` to ``[batch, product of the rest]``.

    Raises:
        TypeError: applied to anything but a floating array.
        ValueError: applied to an array without axes.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> layer = layers.flatten()
    >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 4, 4, 3)))[0].shape
    (2, 48)
    """

    def flat(x: Any) -> jax.Array:
        x = float_input("flatten()", x)
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    return stateless("flatten()", flat)


def _sizes(head: str, kernel_size: Any, stride: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    window = pair(head, "kernel_size", kernel_size)
    return window, window if stride is None else pair(head, "stride", stride)


def _pool(name: str, window: tuple[int, int], reduce: Callable[[jax.Array], jax.Array]) -> Layer[Float, Float]:
    def pooled(x: Any) -> jax.Array:
        x = float_input(name, x, ndim=4, layout="batch, height, width")
        if window[0] > x.shape[1] or window[1] > x.shape[2]:
            raise ValueError(
                f"{here(name)} looks at windows of {window[0]} x {window[1]}, received {tree.describe(x)}: the image "
                "is smaller. Use a smaller kernel_size, or pool less before."
            )
        return reduce(x).astype(x.dtype)

    return stateless(name, pooled)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, window: tuple[int, int]) -> jax.Array:
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
    return y, jnp.where(picked, _windows(_windows(tangents[0], 2, window[1]), 1, window[0]), 0).sum((2, 4))


_largest.defjvp(_derivative_of_largest)


def _largest_and_where(x: jax.Array, window: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    split = _windows(_windows(x, 2, window[1]), 1, window[0])
    largest = split[:, :, 0, :, 0]
    where = jnp.zeros(largest.shape, jnp.int32)
    for place, (i, j) in enumerate(np.ndindex(window)):
        number = split[:, :, i, :, j]
        take = (number > largest) | jnp.isnan(number)
        largest, where = jnp.where(take, number, largest), jnp.where(take, place, where)
    return largest, where


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    # A select, not jnp.maximum: it hands the whole gradient to one of two equal numbers, the first.
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def _taps(x: jax.Array, axis: int, window: int, step: int) -> list[jax.Array]:
    """The first number of each window along an axis, the second of each, and so on: ``window`` arrays.

    Reducing these, one axis after the other, instead of lax.reduce_window: XLA:CPU runs the gradient of the latter's
    maximum (select_and_scatter) 4 to 18 times slower on windows of 2 to 5, inside a loop as outside.
    """
    if window == step:
        split = _windows(x, axis, window)
        return [lax.index_in_dim(split, i, axis + 1, keepdims=False) for i in range(window)]
    last = (x.shape[axis] - window) // step * step
    return [lax.slice_in_dim(x, i, i + last + 1, step, axis) for i in range(window)]


def _windows(x: jax.Array, axis: int, window: int) -> jax.Array:
    """An axis split into windows side by side, ``[..., count, window, ...]``, the rest cut off."""
    count = x.shape[axis] // window
    x = lax.slice_in_dim(x, 0, count * window, axis=axis)
    return x.reshape(*x.shape[:axis], count, window, *x.shape[axis + 1 :])
