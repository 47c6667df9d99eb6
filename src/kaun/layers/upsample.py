"""Upsampling of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kaun._calls import public, shown
from kaun.layers.arguments import AXES, accumulation_dtype, call_text, sizes
from kaun.layers.core import Float, Layer
from kaun.layers.function import stateless
from kaun.layers.inputs import float_input

__all__ = ["upsample2d"]


@public
def upsample2d(scale: int | Sequence[int], method: Literal["nearest", "bilinear"] = "nearest") -> Layer[Float, Float]:
    """Make the layer that enlarges images ``[batch, height, width, channels]`` of any floating dtype.

    The output is ``[batch, height * scale, width * scale, channels]`` in the same dtype. ``"nearest"`` repeats each
    number. ``"bilinear"`` interpolates between the centres of pixels, and repeats the outermost numbers beyond them, as
    PyTorch's ``nn.Upsample(align_corners=False)`` and ``jax.image.resize`` do; half precision is interpolated in
    float32.

    Args:
        scale: How many times larger the image becomes, an int or ``(height, width)``.
        method: ``"nearest"`` (default) or ``"bilinear"``.

    Raises:
        TypeError: If a scale is not an int; when applied, if the input is not a floating array.
        ValueError: If a scale is below 1 or the method is unknown; when applied, if the input does not have four axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.upsample2d((1, 2), method="bilinear")
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1))
        >>> y.ravel()
        Array([0., 1., 3., 4.], dtype=float32)
    """
    scales = sizes("upsample2d", "scale", scale, 2)
    if method not in ("nearest", "bilinear"):
        raise ValueError(
            f"upsample2d(method=...) expected 'nearest' or 'bilinear', received {shown(method)}. For other "
            "methods write "
            "layers.fn(lambda x: jax.image.resize(x, shape, method))."
        )
    name = call_text(upsample2d, scale=scale, method=method)
    enlarged = _repeated if method == "nearest" else _interpolated

    def upsampled(x: Any) -> jax.Array:
        x = float_input(name, x, ndim=4, layout=f"batch, {AXES[2]}")
        return enlarged(enlarged(x, 2, scales[1]), 1, scales[0])

    return stateless(name, upsampled)


def _repeated(x: jax.Array, axis: int, times: int) -> jax.Array:
    return _interleaved([x] * times, axis)


def _interpolated(x: jax.Array, axis: int, times: int) -> jax.Array:
    dtype = accumulation_dtype(x.dtype)
    # One shifted sum for each of the places in a pixel; jax.image.resize multiplies with a dense matrix.
    edges = [(int(i == axis), int(i == axis)) for i in range(x.ndim)]
    padded = jnp.pad(x.astype(dtype), edges, mode="edge")
    before, at, after = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(3))
    places = [(i + 0.5) / times - 0.5 for i in range(times)]
    parts = [at + abs(place) * ((before if place < 0 else after) - at) for place in places]
    return _interleaved(parts, axis).astype(x.dtype)


def _interleaved(parts: list[jax.Array], axis: int) -> jax.Array:
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return jnp.stack(parts, axis + 1).reshape(shape)
