"""Pooling of images, and ``flatten``, which turns what is left into vectors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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

    return _pool(name, window, largest)


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

    return _pool(name, window, lambda x, axis: mean(x.astype(wide(x.dtype)), axis))


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


def _pool(name: str, window: tuple[int, int], along: Callable[[jax.Array, int], jax.Array]) -> Layer[Float, Float]:
    def pooled(x: Any) -> jax.Array:
        x = float_input(name, x, ndim=4, layout="batch, height, width")
        if window[0] > x.shape[1] or window[1] > x.shape[2]:
            raise ValueError(
                f"{here(name)} looks at windows of {window[0]} x {window[1]}, received {tree.describe(x)}: the image "
                "is smaller. Use a smaller kernel_size, or pool less before."
            )
        return along(along(x, 2), 1).astype(x.dtype)

    return stateless(name, pooled)


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
