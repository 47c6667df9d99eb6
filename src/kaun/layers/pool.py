"""Pooling of images, and ``flatten``, which turns what is left into vectors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kaun import tree
from kaun._kernels import larger, largest_in_windows, taps, windows
from kaun.layers.arguments import accumulation_dtype, call_text, pair
from kaun.layers.core import Float, Layer, stateless
from kaun.layers.inputs import float_input
from kaun.layers.path import here

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
    name = call_text(max_pool2d, kernel_size=kernel_size, stride=stride)

    def largest(x: jax.Array, axis: int) -> jax.Array:
        return functools.reduce(larger, taps(x, axis, window[axis - 1], step[axis - 1]))

    if window == step and math.prod(window) <= 16:
        return _pool(name, window, lambda x: largest_in_windows(x, window))
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
    name = call_text(avg_pool2d, kernel_size=kernel_size, stride=stride)

    def mean(x: jax.Array, axis: int) -> jax.Array:
        if window[axis - 1] == step[axis - 1]:
            return windows(x, axis, window[axis - 1]).mean(axis + 1)
        return functools.reduce(operator.add, taps(x, axis, window[axis - 1], step[axis - 1])) / window[axis - 1]

    return _pool(name, window, lambda x: mean(mean(x.astype(accumulation_dtype(x.dtype)), 2), 1))


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
