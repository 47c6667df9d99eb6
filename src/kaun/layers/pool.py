"""Pooling of images, and ``flatten``."""

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
from kaun.layers.core import Float, Layer
from kaun.layers.function import stateless
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = ["avg_pool2d", "flatten", "max_pool2d"]


def max_pool2d(kernel_size: int | Sequence[int], stride: int | Sequence[int] | None = None) -> Layer[Float, Float]:
    """Make the layer that takes the maximum of each window of an image, for each channel.

    The input is ``[batch, height, width, channels]`` of any floating dtype, the output ``[batch, height', width',
    channels]`` of the same dtype, with ``height' = (height - kernel height) // stride + 1``: nothing is padded, and
    rows and columns that do not fill a window are left out. If several numbers of a window are equal to the maximum,
    the gradient goes to the first of them (row by row), as in PyTorch and XLA. The maximum of a window with a NaN is
    NaN.

    Args:
        kernel_size: Size of the window, an int or ``(height, width)``.
        stride: Step between windows, an int or ``(height, width)``. Default: ``kernel_size``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input is not a floating array.
        ValueError: If a size is below 1; when applied, if the input does not have four axes, or the image is smaller
            than the window.

    Examples:
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
    """Make the layer that takes the mean of each window of an image, for each channel.

    The input is ``[batch, height, width, channels]`` of any floating dtype, the output ``[batch, height', width',
    channels]`` of the same dtype, with ``height' = (height - kernel height) // stride + 1``: nothing is padded, and
    rows and columns that do not fill a window are left out. Half precision is summed in float32.

    Args:
        kernel_size: Size of the window, an int or ``(height, width)``.
        stride: Step between windows, an int or ``(height, width)``. Default: ``kernel_size``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input is not a floating array.
        ValueError: If a size is below 1; when applied, if the input does not have four axes, or the image is smaller
            than the window.

    Examples:
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
    """Make the layer that reshapes each item to a vector: ``[batch, ...]`` to ``[batch, product of the rest]``.

    Raises:
        TypeError: If, when applied, the input is not a floating array.
        ValueError: If, when applied, the input has no axes.

    Examples:
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
                f"{here(name)} expected images of at least {window[0]} x {window[1]}, its window size, received "
                f"{tree.describe(x)}. Use a smaller kernel_size, or less pooling in the layers before it."
            )
        return reduce(x).astype(x.dtype)

    return stateless(name, pooled)
