"""Pooling of sequences and images over windows, global pooling, and ``flatten``."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._calls import explained, public
from kaun._kernels import larger, largest_in_windows, taps, windows
from kaun.layers.arguments import AXES, accumulation_dtype, call_text, sizes
from kaun.layers.core import Float, Layer
from kaun.layers.function import stateless
from kaun.layers.inputs import float_input
from kaun.layers.padding import Pads, padding_of, pads_of, too_small
from kaun.layers.path import here

__all__ = [
    "avg_pool1d", "avg_pool2d", "flatten", "global_avg_pool", "global_max_pool", "max_pool1d", "max_pool2d",
]  # fmt: skip


@explained("layers.max_pool1d", "layers.pool")
def max_pool1d(
    kernel_size: int, stride: int | None = None, padding: Literal["SAME", "VALID"] | int | tuple[int, int] = "VALID"
) -> Layer[Float, Float]:
    """Make the layer that takes the maximum of each window of a sequence, for each channel.

    The input is ``[batch, length, channels]`` of any floating dtype, the output ``[batch, length', channels]`` of the
    same dtype. Ties, NaN and padding are as in ``max_pool2d``.

    Args:
        kernel_size: Size of the window.
        stride: Step between windows. Default: ``kernel_size``.
        padding: As for ``max_pool2d``; a single pair is ``(before, after)``. Default: ``"VALID"``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input is not a floating array.
        ValueError: If a size is below 1, or the padding unknown or as large as the window; when applied, if the input
            does not have three axes, or the sequence is shorter than the window.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.max_pool1d(3, stride=1, padding="SAME")
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.array([[[1.0], [5.0], [2.0], [0.0]]]))[0].ravel()
        Array([5., 5., 5., 2.], dtype=float32)
    """
    name = call_text(max_pool1d, kernel_size=kernel_size, stride=stride, padding=padding)
    return _max_pool(name, _windowing("max_pool1d", kernel_size, stride, padding, 1))


@explained("layers.max_pool2d", "layers.pool")
def max_pool2d(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Literal["SAME", "VALID"] | int | Sequence[tuple[int, int]] = "VALID",
) -> Layer[Float, Float]:
    """Make the layer that takes the maximum of each window of an image, for each channel.

    The input is ``[batch, height, width, channels]`` of any floating dtype, the output ``[batch, height', width',
    channels]`` of the same dtype, with ``height' = (height + padding - kernel height) // stride + 1``: rows and columns
    that do not fill a window are left out. If several numbers of a window are equal to the maximum, the gradient goes
    to the first of them (row by row), as in PyTorch and XLA. The maximum of a window with a NaN is NaN.

    Args:
        kernel_size: Size of the window, an int or ``(height, width)``.
        stride: Step between windows, an int or ``(height, width)``. Default: ``kernel_size``.
        padding: ``"VALID"`` (default) adds nothing. Otherwise minus infinity is added, which is never the maximum:
            ``"SAME"`` as much as gives ``height' = ceil(height / stride)``, an int that many places at each end, as in
            PyTorch, ``((top, bottom), (left, right))`` each of these; less than the window.

    Raises:
        TypeError: If a size is not an int; when applied, if the input is not a floating array.
        ValueError: If a size is below 1, or the padding unknown or as large as the window; when applied, if the input
            does not have four axes, or the image is smaller than the window.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.max_pool2d(2)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.arange(16.0).reshape(1, 4, 4, 1))
        >>> y.reshape(2, 2)
        Array([[ 5.,  7.],
               [13., 15.]], dtype=float32)
    """
    name = call_text(max_pool2d, kernel_size=kernel_size, stride=stride, padding=padding)
    return _max_pool(name, _windowing("max_pool2d", kernel_size, stride, padding, 2))


@explained("layers.avg_pool1d", "layers.pool")
def avg_pool1d(
    kernel_size: int,
    stride: int | None = None,
    padding: Literal["SAME", "VALID"] | int | tuple[int, int] = "VALID",
    count_include_pad: bool = True,
) -> Layer[Float, Float]:
    """Make the layer that takes the mean of each window of a sequence, for each channel.

    The input is ``[batch, length, channels]`` of any floating dtype, the output ``[batch, length', channels]`` of the
    same dtype. Half precision is summed in float32.

    Args:
        kernel_size: Size of the window.
        stride: Step between windows. Default: ``kernel_size``.
        padding: As for ``avg_pool2d``; a single pair is ``(before, after)``. Default: ``"VALID"``.
        count_include_pad: Whether the zeros of the padding count in the mean. Default: True.

    Raises:
        TypeError: If a size is not an int; when applied, if the input is not a floating array.
        ValueError: If a size is below 1, or the padding unknown or as large as the window; when applied, if the input
            does not have three axes, or the sequence is shorter than the window.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.avg_pool1d(2)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.array([[[1.0], [5.0], [2.0], [0.0]]]))[0].ravel()
        Array([3., 1.], dtype=float32)
    """
    name = call_text(
        avg_pool1d, kernel_size=kernel_size, stride=stride, padding=padding, count_include_pad=count_include_pad
    )
    return _avg_pool(name, _windowing("avg_pool1d", kernel_size, stride, padding, 1), count_include_pad)


@explained("layers.avg_pool2d", "layers.pool")
def avg_pool2d(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Literal["SAME", "VALID"] | int | Sequence[tuple[int, int]] = "VALID",
    count_include_pad: bool = True,
) -> Layer[Float, Float]:
    """Make the layer that takes the mean of each window of an image, for each channel.

    The input is ``[batch, height, width, channels]`` of any floating dtype, the output ``[batch, height', width',
    channels]`` of the same dtype, with ``height' = (height + padding - kernel height) // stride + 1``: rows and columns
    that do not fill a window are left out. Half precision is summed in float32.

    Args:
        kernel_size: Size of the window, an int or ``(height, width)``.
        stride: Step between windows, an int or ``(height, width)``. Default: ``kernel_size``.
        padding: ``"VALID"`` (default) adds nothing. Otherwise zeros are added: ``"SAME"`` as many as give ``height' =
            ceil(height / stride)``, an int that many at each end, as in PyTorch, ``((top, bottom), (left, right))``
            each of these; less than the window.
        count_include_pad: Whether the zeros of the padding count in the mean, as in PyTorch and Flax. Keras has False.
            Default: True.

    Raises:
        TypeError: If a size is not an int; when applied, if the input is not a floating array.
        ValueError: If a size is below 1, or the padding unknown or as large as the window; when applied, if the input
            does not have four axes, or the image is smaller than the window.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.avg_pool2d((2, 4))
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.arange(16.0).reshape(1, 4, 4, 1))
        >>> y.reshape(2)
        Array([ 3.5, 11.5], dtype=float32)
    """
    name = call_text(
        avg_pool2d, kernel_size=kernel_size, stride=stride, padding=padding, count_include_pad=count_include_pad
    )
    return _avg_pool(name, _windowing("avg_pool2d", kernel_size, stride, padding, 2), count_include_pad)


@public
def global_avg_pool() -> Layer[Float, Float]:
    """Make the layer that takes the mean over all axes but the first and the last, ``[batch, ..., channels]``.

    The output is ``[batch, channels]`` in the dtype of the input, any floating dtype; half precision is summed in
    float32.

    Raises:
        TypeError: If, when applied, the input is not a floating array.
        ValueError: If, when applied, the input has fewer than three axes, or one between them is empty.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.global_avg_pool()
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.arange(8.0).reshape(1, 2, 2, 2))[0]
        Array([[3., 4.]], dtype=float32)
    """
    return _global("global_avg_pool()", lambda z: z.astype(accumulation_dtype(z.dtype)).mean(1))


@public
def global_max_pool() -> Layer[Float, Float]:
    """Make the layer that takes the maximum over all axes but the first and the last, ``[batch, ..., channels]``.

    The output is ``[batch, channels]`` in the dtype of the input, any floating dtype. As in ``max_pool2d`` the gradient
    goes to the first of equal numbers, and the maximum is NaN where there is one.

    Raises:
        TypeError: If, when applied, the input is not a floating array.
        ValueError: If, when applied, the input has fewer than three axes, or one between them is empty.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.global_max_pool()
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.arange(8.0).reshape(1, 2, 2, 2))[0]
        Array([[6., 7.]], dtype=float32)
    """

    def largest(z: jax.Array) -> jax.Array:
        places = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
        return jnp.where(places == jnp.argmax(z, 1, keepdims=True).astype(jnp.int32), z, 0).sum(1)

    return _global("global_max_pool()", largest)


@explained("layers.flatten", "layers.activation")
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


class _Windowing(NamedTuple):
    """Window, step and padding of a pool along the axes between batch and channels."""

    window: tuple[int, ...]
    step: tuple[int, ...]
    padding: Pads


def _windowing(head: str, kernel_size: Any, stride: Any, padding: Any, axes: int) -> _Windowing:
    window = sizes(head, "kernel_size", kernel_size, axes)
    step = window if stride is None else sizes(head, "stride", stride, axes)
    padding = padding_of(head, padding, axes)
    if not isinstance(padding, str) and any(max(pads) >= size for pads, size in zip(padding, window, strict=True)):
        raise ValueError(
            f"{head}(kernel_size={kernel_size!r}, padding={padding!r}): the padding must be smaller than the window, "
            f'which would otherwise hold nothing else. Write padding={min(window) // 2} or padding="SAME".'
        )
    return _Windowing(window, step, padding)


def _max_pool(name: str, pool: _Windowing) -> Layer[Float, Float]:
    def largest(x: jax.Array, window: tuple[int, ...], step: tuple[int, ...]) -> jax.Array:
        if window == step and math.prod(window) <= 16:
            return largest_in_windows(x, (window[0], window[1]))
        for axis in (2, 1):
            x = functools.reduce(larger, taps(x, axis, window[axis - 1], step[axis - 1]))
        return x

    def pooled(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
        return _as_image(_padded(x, pads, -math.inf), pool, largest)

    return _pool(name, pool, pooled)


def _avg_pool(name: str, pool: _Windowing, count_include_pad: bool) -> Layer[Float, Float]:
    def mean(x: jax.Array, window: tuple[int, ...], step: tuple[int, ...]) -> jax.Array:
        for axis in (2, 1):
            size = window[axis - 1]
            if size == step[axis - 1]:
                x = windows(x, axis, size).mean(axis + 1)
            else:
                x = functools.reduce(operator.add, taps(x, axis, size, step[axis - 1])) / size
        return x

    def pooled(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
        z = x.astype(accumulation_dtype(x.dtype))
        y = _as_image(_padded(z, pads, 0.0), pool, mean)
        if count_include_pad:
            return y
        for axis, (size, step, (low, _)) in enumerate(zip(pool.window, pool.step, pads, strict=True), 1):
            first = jax.lax.broadcasted_iota(jnp.int32, (y.shape[axis],), 0) * step - low
            count = jnp.minimum(first + size, x.shape[axis]) - jnp.maximum(first, 0)
            share = size / count.astype(y.dtype)
            y = y * jnp.expand_dims(share, [i for i in range(y.ndim) if i != axis])
        return y

    return _pool(name, pool, pooled)


def _pool(
    name: str, pool: _Windowing, pooled: Callable[[jax.Array, Sequence[tuple[int, int]]], jax.Array]
) -> Layer[Float, Float]:
    axes = len(pool.window)

    def apply(x: Any) -> jax.Array:
        x = float_input(name, x, ndim=axes + 2, layout=f"batch, {AXES[axes]}")
        pads = pads_of(pool.padding, x.shape[1:-1], pool.window, pool.step)
        needed = too_small(x, pool.window, pads)
        if needed:
            what = "sequences" if axes == 1 else "images"
            padded = " without its padding" if any(map(sum, pads)) else ""
            raise ValueError(
                f"{here(name)} expected {what} of at least {needed}, its window size{padded}, "
                f"received {tree.describe(x)}. Use a smaller kernel_size, or less pooling in the layers before it."
            )
        return pooled(x, pads).astype(x.dtype)

    return stateless(name, apply)


def _padded(x: jax.Array, pads: Sequence[tuple[int, int]], fill: float) -> jax.Array:
    if not any(map(sum, pads)):
        return x
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])


def _as_image(x: jax.Array, pool: _Windowing, reduce: Callable[..., jax.Array]) -> jax.Array:
    if x.ndim == 3:  # a sequence is pooled as an image with one row
        return reduce(x[:, None], (1, *pool.window), (1, *pool.step))[:, 0]
    return reduce(x, pool.window, pool.step)


def _global(name: str, reduce: Callable[[jax.Array], jax.Array]) -> Layer[Float, Float]:
    def pooled(x: Any) -> jax.Array:
        x = float_input(name, x, layout="batch, ...")
        places = math.prod(x.shape[1:-1])
        if x.ndim < 3 or places == 0:
            raise ValueError(
                f"{here(name)} expected [batch, ..., channels] with places to pool in between, received "
                f"{tree.describe(x)}. Put it after the last convolution, before flatten()."
            )
        return reduce(x.reshape(x.shape[0], places, x.shape[-1])).astype(x.dtype)

    return stateless(name, pooled)
