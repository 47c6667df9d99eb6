"""Convolutions with 3 x 3 kernels by Winograd's F(2 x 2, 3 x 3): 16 multiplications for four outputs instead of 36.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): each 4 x 4 tile of the input, tiles two
apart, is transformed; so is the kernel; their products, one matrix product for each of the 16 places, are summed over
the channels and transformed into 2 x 2 outputs.

Root mean square errors against float64 are 1.2 to 1.9 times those of the direct form. An input that is not finite
makes the four outputs of each of its tiles nan, where the direct form gives infinities for some of them.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["is_worthwhile", "winograd", "winograd_tangent"]

# Channels and filters from which it pays: forwards and both gradients together took 1.17 of the time of the direct form
# with 64 of both, 0.81 with 96, 0.71 with 128, 0.63 with 256, 0.71 with 512 (batches of 32, XLA:CPU of JAX 0.10.2).
_FEWEST_CHANNELS = 96
# Tiles of the whole batch from which it pays with any number of channels: with 64 tiles and 512 channels it took 0.94
# of the time, because the kernel is transformed too, which does not depend on the tiles.
_FEWEST_TILES = 64
# Outputs computed for each one that is kept, at most: an odd height or width is filled up to whole tiles. For 7 x 7 it
# took 0.74 of the time.
_MOST_FILLED = 1.35
# Channels, and backwards filters, that one product sums over. With 512 in one, the rounding error was 2.6 times that of
# the direct form; in two it is 1.9 times that.
_SUMMED = 256

_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
_BATCHED = (((2,), (1,)), ((0,), (0,)))

Padding = tuple[tuple[int, int], tuple[int, int]]


def is_worthwhile(x_shape: tuple[Any, ...], weight_shape: tuple[int, ...], padding: Any) -> bool:
    """Return whether a convolution without stride and dilation is faster in this form, by shapes alone.

    Args:
        x_shape: ``[batch, height, width, channels]``.
        weight_shape: ``[height, width, channels, filters]``.
        padding: Zeros before and after each axis.
    """
    if weight_shape[:2] != (3, 3) or min(weight_shape[2:]) < _FEWEST_CHANNELS:
        return False
    high, wide = (n + sum(pads) - 2 for n, pads in zip(x_shape[1:3], padding, strict=True))
    rows, columns = -(-high // 2), -(-wide // 2)
    return x_shape[0] * rows * columns >= _FEWEST_TILES and 4 * rows * columns <= _MOST_FILLED * high * wide


def winograd(x: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
    """Return the convolution of an image batch with a 3 x 3 kernel, without stride and dilation.

    Args:
        x: ``[batch, height, width, channels]``.
        weight: ``[3, 3, channels, filters]`` of the same dtype.
        padding: Zeros before and after each axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun._kernels.winograd import winograd
        >>> winograd(jnp.ones((1, 3, 4, 1)), jnp.ones((3, 3, 1, 1)), ((0, 0), (1, 0))).ravel()
        Array([6., 9., 9.], dtype=float32)
    """
    sizes = _sizes(x, padding)
    return _outputs(_products(_inputs(_padded(x, padding, sizes), sizes), weight), x.shape[0], sizes)


def winograd_tangent(x: jax.Array, weight: jax.Array, x_dot: Any, weight_dot: Any, padding: Padding) -> jax.Array:
    """Return the derivative of ``winograd`` along the tangents of image and kernel, None where one of them is zero.

    Its transpose, which is what training runs, keeps image and kernel and not their transforms: these are four times as
    large as the images, and are computed again.
    """
    sizes = _sizes(x, padding)

    @jax.checkpoint
    def derivative(x: jax.Array, weight: jax.Array, x_dot: Any, weight_dot: Any) -> jax.Array:
        sums: Any = 0
        if weight_dot is not None:
            sums = _products(_inputs(_padded(x, padding, sizes), sizes), weight_dot)
        if x_dot is not None:
            taps = _inputs_by_product(_padded(x_dot, padding, sizes), sizes)
            # In parts along the filters, over which the transpose sums.
            parts = [lax.dot_general(taps, _kernels(part), _BATCHED) for part in _parts(weight, 3)]
            sums = sums + jnp.concatenate(parts, axis=2)
        return _outputs(sums, x.shape[0], sizes)

    return derivative(x, weight, x_dot, weight_dot)


def _sizes(x: jax.Array, padding: Padding) -> tuple[int, int]:
    high, wide = (n + sum(pads) - 2 for n, pads in zip(x.shape[1:3], padding, strict=True))
    return high, wide


def _tiles(sizes: tuple[int, int]) -> tuple[int, int]:
    return -(-sizes[0] // 2), -(-sizes[1] // 2)


def _padded(x: jax.Array, padding: Padding, sizes: tuple[int, int]) -> jax.Array:
    (top, bottom), (left, right) = padding
    pads = [(0, 0), (top, bottom + sizes[0] % 2), (left, right + sizes[1] % 2), (0, 0)]
    return jnp.pad(x, pads)


def _inputs(x: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    """Return the transforms of the tiles of a padded image, ``[16, tiles, channels]``, in one pass over it."""
    (rows, columns), (batch, channels) = _tiles(sizes), (x.shape[0], x.shape[3])
    split = x.reshape(batch, rows + 1, 2, columns + 1, 2, channels)
    sums: Any = 0
    for i, j in np.ndindex(4, 4):
        tap = split[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]
        factors = np.multiply.outer(_INPUT[:, i], _INPUT[:, j]).reshape(4, 4, 1, 1, 1, 1)
        sums = sums + jnp.asarray(factors, x.dtype) * tap[None, None]
    return sums.reshape(16, -1, channels)


def _inputs_by_product(x: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    """Return what ``_inputs`` does, as a matrix product, whose transpose is fast."""
    (rows, columns), (batch, channels) = _tiles(sizes), (x.shape[0], x.shape[3])
    split = x.reshape(batch, rows + 1, 2, columns + 1, 2, channels).transpose(2, 4, 0, 1, 3, 5)
    moved = [split[:, :, :, i : i + rows, j : j + columns] for i, j in np.ndindex(2, 2)]
    taps = jnp.stack(moved).reshape(2, 2, 2, 2, -1).transpose(0, 2, 1, 3, 4)
    return (_both(_INPUT, x) @ taps.reshape(16, -1)).reshape(16, -1, channels)


def _kernels(weight: jax.Array) -> jax.Array:
    return (_both(_KERNEL, weight) @ weight.reshape(9, -1)).reshape(16, *weight.shape[2:])


def _products(inputs: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the products at the 16 places, ``[16, tiles, filters]``, summed over the channels."""
    # Parts of the kernel, and not of its transform, which is larger.
    pairs = zip(_parts(inputs, 2), map(_kernels, _parts(weight, 2)), strict=True)
    return functools.reduce(operator.add, [lax.dot_general(*pair, _BATCHED) for pair in pairs])


def _parts(a: jax.Array, axis: int) -> list[jax.Array]:
    size = a.shape[axis]
    return [lax.slice_in_dim(a, i, min(i + _SUMMED, size), axis=axis) for i in range(0, size, _SUMMED)]


def _outputs(sums: jax.Array, batch: int, sizes: tuple[int, int]) -> jax.Array:
    (rows, columns), filters = _tiles(sizes), sums.shape[2]
    y = (_both(_OUTPUT, sums) @ sums.reshape(16, -1)).reshape(2, 2, batch, rows, columns, filters)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(batch, 2 * rows, 2 * columns, filters)
    return y[:, : sizes[0], : sizes[1]]


def _both(factors: Any, like: jax.Array) -> jax.Array:
    """Return the transform along both axes as one matrix."""
    return jnp.asarray(np.kron(factors, factors), like.dtype)
