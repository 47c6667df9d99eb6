"""Convolutions that stay fast inside compiled loops.

XLA:CPU converts the convolutions of a program to the layout of its fast kernels, but not those inside a loop: there all
but the canonical layout (channels last, ``HWIO``) run 5 to 70 times slower. JAX's own gradients are not canonical.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from kaun._kernels.winograd import is_worthwhile, winograd, winograd_tangent

__all__ = ["ConvConfig", "convolve", "convolve_transposed"]

# The images that one convolution for the gradient of a weight takes.
_IMAGES = 32


class ConvConfig:
    """Stride, dilation and zero padding of a convolution, each for height and width, of volumes for depth first."""

    __slots__ = ("dilation", "padding", "stride")

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Sequence[tuple[int, int]]

    def __init__(self, stride: tuple[int, ...], dilation: tuple[int, ...], padding: Sequence[tuple[int, int]]) -> None:
        self.stride, self.dilation, self.padding = stride, dilation, padding


def convolve(x: jax.Array, weight: jax.Array, config: ConvConfig, groups: int) -> jax.Array:
    """Return the convolution of a batch of images, or of volumes, with a kernel.

    On a CPU the convolution and its gradients run equally fast inside compiled loops and outside. Forward-mode and
    second derivatives are correct too, but not all of them are fast in loops (``slow_in_loops`` detects which). On
    other devices this is ``lax.conv_general_dilated``.

    Args:
        x: ``[batch, height, width, channels]`` or ``[batch, depth, height, width, channels]`` in float32 or float64;
            half precision would round between the parts that are summed here.
        weight: ``[height, width, channels / groups, filters]``, or with a depth first, of the same dtype.
        config: Stride, dilation and padding.
        groups: The number of groups of channels, which divides channels and filters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun._kernels import ConvConfig, convolve
        >>> config = ConvConfig((1, 1), (1, 1), [(0, 0), (1, 0)])
        >>> convolve(jnp.ones((1, 1, 4, 1)), jnp.ones((1, 2, 1, 1)), config, groups=1).ravel()
        Array([1., 2., 2., 2.], dtype=float32)
    """
    if jax.default_backend() != "cpu":
        depth = "D" * (x.ndim - 4)
        return _library(x, weight, config, (f"N{depth}HWC", f"{depth}HWIO", f"N{depth}HWC"), groups)
    if x.ndim == 5:
        return _volumes(x, weight, config, groups)
    if groups == 1:
        return _dense(x, weight, config)
    return (_depthwise if weight.shape[2] == 1 else _grouped)(_padded(x, config), weight, config, groups)


def convolve_transposed(x: jax.Array, weight: jax.Array, config: ConvConfig) -> jax.Array:
    """Return the transposed convolution of an image batch: each number adds the kernel, times itself, to the output.

    The number at ``i`` adds to the places ``i * stride + k * dilation``. The outputs whose places have one remainder by
    the stride are an ordinary convolution, so all of them are one ``convolve`` with as many times the filters: there is
    no multiplication with zeros, and it is as fast in loops.

    Args:
        x: ``[batch, height, width, channels]`` in float32 or float64.
        weight: ``[height, width, channels, filters]`` of the same dtype.
        config: Stride, dilation, and as padding how many places are cut at both ends of each axis; a negative number
            adds zeros.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun._kernels import ConvConfig, convolve_transposed
        >>> config = ConvConfig((1, 2), (1, 1), [(0, 0), (0, 0)])
        >>> x, weight = jnp.array([[[[1.0], [2.0]]]]), jnp.array([[[[10.0]], [[1.0]], [[0.5]]]])
        >>> convolve_transposed(x, weight, config).ravel()
        Array([10. ,  1. , 20.5,  2. ,  1. ], dtype=float32)
    """
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[:2], config.dilation, strict=True)]
    lengths = [(n - 1) * s + span for n, s, span in zip(x.shape[1:3], config.stride, spans, strict=True)]
    dilation = [d if s == 1 else 1 for s, d in zip(config.stride, config.dilation, strict=True)]
    # Along an axis with a stride the kernel's own zeros, and zeros up to a multiple of the stride.
    interior = [d - 1 if s > 1 else 0 for s, d in zip(config.stride, config.dilation, strict=True)]
    ends = [-span % s for s, span in zip(config.stride, spans, strict=True)]
    zero = jnp.zeros((), weight.dtype)
    weight = lax.pad(weight, zero, [(0, ends[0], interior[0]), (0, ends[1], interior[1]), (0, 0, 0), (0, 0, 0)])
    (rows, columns), (high, wide), filters = config.stride, weight.shape[:2], weight.shape[3]
    split = weight.reshape(high // rows, rows, wide // columns, columns, weight.shape[2], filters)
    kernel = split.transpose(0, 2, 4, 1, 3, 5)[::-1, ::-1].reshape(high // rows, wide // columns, weight.shape[2], -1)
    reach = [(k - 1) * d for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    y = convolve(x, kernel, ConvConfig((1, 1), tuple(dilation), [(n, n) for n in reach]), 1)
    y = y.reshape(*y.shape[:3], rows, columns, filters).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(y.shape[0], y.shape[1] * rows, y.shape[3] * columns, filters)
    cuts = zip(lengths, y.shape[1:3], config.padding, strict=True)
    cut = [(-low, length - high - made, 0) for length, made, (low, high) in cuts]
    return lax.pad(y, zero, [(0, 0, 0), *cut, (0, 0, 0)])


def _library(
    x: jax.Array, weight: jax.Array, config: ConvConfig, layout: tuple[str, str, str], groups: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x, weight, config.stride, config.padding, rhs_dilation=config.dilation, dimension_numbers=layout,
        feature_group_count=groups,
    )  # fmt: skip


def _volumes(x: jax.Array, weight: jax.Array, config: ConvConfig, groups: int) -> jax.Array:
    """Return the convolution of volumes as a sum of convolutions of images, one for each plane of the kernel.

    XLA:CPU has no fast kernel for volumes: a step with 3 x 3 x 3 kernels on 16 x 16 x 16 took 4 times as long as this
    outside loops, and 20 times inside.
    """
    plane = ConvConfig(config.stride[1:], config.dilation[1:], config.padding[1:])
    x = jnp.pad(x, [(0, 0), config.padding[0], (0, 0), (0, 0), (0, 0)])
    taps = _taps(x, 1, weight.shape[0], config)
    parts = (convolve(t.reshape(-1, *t.shape[2:]), w, plane, groups) for t, w in zip(taps, weight, strict=True))
    y = functools.reduce(operator.add, parts)
    return y.reshape(*taps[0].shape[:2], *y.shape[1:])


def _dense(x: jax.Array, weight: jax.Array, config: ConvConfig) -> jax.Array:
    if _is_wide(x, weight, config):
        return _wide(x, weight, config)

    @jax.custom_jvp
    def convolved(x: jax.Array, weight: jax.Array) -> jax.Array:
        if x.shape[3] == 1 and math.prod(weight.shape[:2]) <= 16:
            # The fast kernel is slow for one channel: 3 times slower than this on 3 x 3.
            return _one_product(_padded(x, config), weight, config)
        return _library(x, weight, config, ("NHWC", "HWIO", "NHWC"), 1)

    def derivative(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        (x, weight), (x_dot, weight_dot) = primals, tangents
        parts: list[jax.Array] = []
        if not isinstance(x_dot, SymbolicZero):
            # Its transpose, which is what training runs, is in canonical layout.
            parts.append(_library(x_dot, weight.swapaxes(2, 3), config, ("NHWC", "HWOI", "NHWC"), 1))
        if not isinstance(weight_dot, SymbolicZero):
            parts.append(_along_weight(x, weight_dot, config))
        return convolved(x, weight), functools.reduce(operator.add, parts)

    convolved.defjvp(derivative, symbolic_zeros=True)
    return convolved(x, weight)


def _is_wide(x: jax.Array, weight: jax.Array, config: ConvConfig) -> bool:
    if {*config.stride, *config.dilation} != {1} or type(x.shape[0]) is not int or any(jax.typeof(x).sharding.spec):
        return False
    return is_worthwhile(x.shape, weight.shape, config.padding)


def _wide(x: jax.Array, weight: jax.Array, config: ConvConfig) -> jax.Array:
    (rows, columns) = config.padding

    @jax.custom_jvp
    def convolved(x: jax.Array, weight: jax.Array) -> jax.Array:
        return winograd(x, weight, (rows, columns))

    def derivative(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        given = [None if isinstance(tangent, SymbolicZero) else tangent for tangent in tangents]
        return convolved(*primals), winograd_tangent(*primals, given[0], given[1], (rows, columns))

    convolved.defjvp(derivative, symbolic_zeros=True)
    return convolved(x, weight)


def _along_weight(x: jax.Array, weight_dot: jax.Array, config: ConvConfig) -> jax.Array:
    """Return the convolution with a weight's tangent, in a form whose transpose, the weight's gradient, is fast.

    Without stride the gradient is itself a canonical convolution, of the channels as a batch with the batch as
    channels: for 32 images it takes 0.3 to 0.9 of the time of products, and a third of their memory. Above 32 images it
    is computed in parts: 256 in one took 2 to 4 times as long.
    """
    batch, channels = x.shape[0], x.shape[3]
    products = math.prod(weight_dot.shape[:2]) < 4 or channels < 8 or {*config.stride, *config.dilation} != {1}
    # The batch may have any length (jax.export), one item (where a loop is quicker), or an axis of a mesh.
    if products or type(batch) is not int or batch < 2 or any(jax.typeof(x).sharding.spec):
        return _products(_padded(x, config), weight_dot, config)
    x, weight_dot = x.transpose(3, 1, 2, 0), weight_dot.transpose(2, 0, 1, 3)
    size = math.ceil(batch / math.ceil(batch / _IMAGES))
    parts = [lax.slice_in_dim(x, i, min(i + size, batch), axis=3) for i in range(0, batch, size)]
    parts = [_library(part, weight_dot, config, ("CHWN", "IHWO", "HWNC"), 1) for part in parts]
    return jnp.concatenate(parts, axis=2).transpose(2, 0, 1, 3)


def _padded(x: jax.Array, config: ConvConfig) -> jax.Array:
    return jnp.pad(x, [(0, 0), *config.padding, (0, 0)])


def _products(x: jax.Array, weight: jax.Array, config: ConvConfig) -> jax.Array:
    """Return the convolution of a padded image as one matrix product for each row of the kernel.

    Its gradient with respect to the weight has as many products. One product for all rows would take more memory, and
    one for each place of the kernel more time.
    """
    height, width, _, filters = weight.shape
    columns = jnp.concatenate(_taps(x, 2, width, config), axis=-1)
    rows = _taps(columns, 1, height, config)
    flat = [row.reshape(-1, row.shape[3]) @ w.reshape(-1, filters) for row, w in zip(rows, weight, strict=True)]
    return functools.reduce(operator.add, flat).reshape(*rows[0].shape[:3], filters)


def _one_product(x: jax.Array, weight: jax.Array, config: ConvConfig) -> jax.Array:
    taps = jnp.concatenate(_all_taps(x, weight, config), axis=-1)
    y = taps.reshape(-1, taps.shape[3]) @ weight.reshape(-1, weight.shape[3])
    return y.reshape(*taps.shape[:3], weight.shape[3])


def _grouped(x: jax.Array, weight: jax.Array, config: ConvConfig, groups: int) -> jax.Array:
    def groups_first(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(*a.shape[:3], groups, a.shape[3] // groups), 3, 0)

    inputs, weights = groups_first(x), groups_first(weight)
    y = jax.vmap(lambda x, weight: _products(x, weight, config))(inputs, weights)
    return jnp.moveaxis(y, 0, 3).reshape(*y.shape[1:4], weight.shape[3])


def _depthwise(x: jax.Array, weight: jax.Array, config: ConvConfig, groups: int) -> jax.Array:
    # There is little to multiply: the fast kernel takes 15 to 30 times as long as this sum.
    filters = weight.shape[3]
    x = jnp.repeat(x, filters // groups, axis=3) if filters > groups else x
    weights = weight.reshape(-1, 1, 1, 1, filters)
    return functools.reduce(operator.add, (t * w for t, w in zip(_all_taps(x, weight, config), weights, strict=True)))


def _all_taps(x: jax.Array, weight: jax.Array, config: ConvConfig) -> list[jax.Array]:
    height, width = weight.shape[:2]
    return [tap for row in _taps(x, 1, height, config) for tap in _taps(row, 2, width, config)]


def _taps(x: jax.Array, axis: int, count: int, config: ConvConfig) -> list[jax.Array]:
    """Return for each place of the kernel along an axis the part of a padded image that it is multiplied with."""
    step, dilation = config.stride[axis - 1], config.dilation[axis - 1]
    last = (x.shape[axis] - (count - 1) * dilation - 1) // step * step
    return [lax.slice_in_dim(x, i * dilation, i * dilation + last + 1, step, axis) for i in range(count)]
