"""Transposed convolutions of sequences and images, channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax

from kaun import tree
from kaun._calls import explained
from kaun._kernels import ConvConfig, convolve_transposed
from kaun.context import Context
from kaun.layers.arguments import AXES, along_last, call_text, size, sizes
from kaun.layers.conv import on_images
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_affine
from kaun.layers.inputs import float_input
from kaun.layers.padding import Pads, padding_of
from kaun.layers.path import here

__all__ = ["conv_transpose1d", "conv_transpose2d"]


@explained("layers.conv_transpose1d", "layers.conv")
def conv_transpose1d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: Literal["SAME", "VALID"] | int | tuple[int, int] = "SAME",
    output_padding: int = 0,
    dilation: int = 1,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make the transposed convolution of sequences, ``[batch, length, in_channels]`` to a longer one.

    Each input position adds the kernel, times itself, to the output ``[batch, length', out_channels]``, ``stride``
    places after that of the position before it: the gradient of ``conv1d`` with respect to its input. Parameters:
    ``weight`` ``[kernel_size, in_channels, out_channels]``, which is not flipped, and, unless ``bias=False``, ``bias``
    ``[out_channels]``.

    Args:
        in_channels: Size of the input's last axis.
        out_channels: Size of the output's last axis.
        kernel_size: Number of positions in the kernel.
        stride: Step between the kernels in the output. Default: 1.
        padding: ``"SAME"`` (default) gives ``length' = length * stride``. ``"VALID"`` keeps every position that a
            kernel reaches, and at least ``length * stride``. An int, or a pair ``(before, after)``, is cut at the ends,
            as in PyTorch: ``length' = (length - 1) * stride + (kernel_size - 1) * dilation + 1 - before - after +
            output_padding``.
        output_padding: Positions added at the end, fewer than the stride or the dilation; only where ``padding`` is an
            int or a pair. Default: 0.
        dilation: Step between the outputs of one input. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int, or the padding has another form; when applied, if the input has another
            dtype.
        ValueError: If a size is below 1, the padding unknown or negative, or ``output_padding`` too large or used with
            a word as padding; when applied, if the input has another shape, or nothing is left of the output.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.conv_transpose1d(3, 8, kernel_size=4, stride=2)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 10, 3)))
        >>> y.shape
        (2, 20, 8)
    """
    name = call_text(
        conv_transpose1d, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
        padding=padding, output_padding=output_padding, dilation=dilation, bias=bias,
    )  # fmt: skip
    return _transposed(
        name, in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, bias, weight_init,
        bias_init, 1,
    )  # fmt: skip


@explained("layers.conv_transpose2d", "layers.conv")
def conv_transpose2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Literal["SAME", "VALID"] | int | Sequence[tuple[int, int]] = "SAME",
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make the transposed convolution of images, ``[batch, height, width, in_channels]`` to a larger one.

    Each input position adds the kernel, times itself, to the output ``[batch, height', width', out_channels]``, a
    stride after that of the position before it: the gradient of ``conv2d`` with respect to its input. Parameters:
    ``weight`` ``[kernel height, kernel width, in_channels, out_channels]``, which is not flipped, and, unless
    ``bias=False``, ``bias`` ``[out_channels]``.

    Args:
        in_channels: Size of the input's last axis.
        out_channels: Size of the output's last axis.
        kernel_size: Size of the kernel, an int or ``(height, width)``.
        stride: Step between the kernels in the output, an int or ``(height, width)``. Default: 1.
        padding: ``"SAME"`` (default) gives ``height' = height * stride``. ``"VALID"`` keeps every position that a
            kernel reaches, and at least ``height * stride``. An int, or ``((top, bottom), (left, right))``, is cut at
            the ends, as in PyTorch: ``height' = (height - 1) * stride + (kernel height - 1) * dilation + 1 - top -
            bottom + output_padding``.
        output_padding: Rows and columns added at the bottom and right, an int or ``(height, width)``, fewer than the
            stride or the dilation; only where ``padding`` is an int or pairs. Default: 0.
        dilation: Step between the outputs of one input, an int or ``(height, width)``. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int, or the padding has another form; when applied, if the input has another
            dtype.
        ValueError: If a size is below 1, the padding unknown or negative, or ``output_padding`` too large or used with
            a word as padding; when applied, if the input has another shape, or nothing is left of the output.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.conv_transpose2d(16, 3, kernel_size=4, stride=2, padding=1)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 7, 7, 16)))
        >>> y.shape
        (2, 14, 14, 3)
    """
    name = call_text(
        conv_transpose2d, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
        padding=padding, output_padding=output_padding, dilation=dilation, bias=bias,
    )  # fmt: skip
    return _transposed(
        name, in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, bias, weight_init,
        bias_init, 2,
    )  # fmt: skip


def _transposed(
    name: str, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, output_padding: Any,
    dilation: Any, bias: bool, weight_init: Initializer, bias_init: Initializer, axes: int,
) -> Layer[Float, Float]:  # fmt: skip
    head = name.split("(", 1)[0]
    channels, filters = size(head, "in_channels", in_channels), size(head, "out_channels", out_channels)
    kernel, stride = sizes(head, "kernel_size", kernel_size, axes), sizes(head, "stride", stride, axes)
    dilation, padding = sizes(head, "dilation", dilation, axes), padding_of(head, padding, axes)
    added = sizes(head, "output_padding", output_padding, axes, least=0)
    _check_output_padding(head, padding, added, stride, dilation)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    cuts = [_cut(padding, axis, spans[axis], stride[axis], added[axis]) for axis in range(axes)]

    def init(*, dtype: Any) -> Vars:
        shape = (*kernel, channels, filters)
        params = init_affine(name, weight_init, shape, bias_init if bias else None, dtype)
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=channels, ndim=axes + 2, layout=f"batch, {AXES[axes]}")
        _must_be_left(name, x, spans, stride, cuts)
        y = on_images(convolve_transposed, x, vars.params["weight"], ConvConfig(stride, dilation, cuts))
        if bias:
            y = y + along_last(vars.params["bias"], y.ndim)
        return y, vars

    return Layer(init=init, apply=apply, name=name)


def _cut(padding: Pads, axis: int, span: int, step: int, added: int) -> tuple[int, int]:
    """What is cut at both ends of an axis; a negative number adds zeros."""
    if padding == "VALID":
        return 0, -max(step - span, 0)
    if padding == "SAME":
        low = max(span - step, 0) // 2
        return low, span - step - low
    low, high = padding[axis]
    return int(low), int(high) - added


def _check_output_padding(
    head: str, padding: Pads, added: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> None:
    if isinstance(padding, str) and any(added):
        raise ValueError(
            f"{head}(padding={padding!r}, output_padding={max(added)}): the padding already says how large the output "
            "is. Leave output_padding out, or write the padding as an int."
        )
    for count, step, apart in zip(added, stride, dilation, strict=True):
        if count >= max(step, apart) and count:
            raise ValueError(
                f"{head}(output_padding=...) expected less than the stride {step} or the dilation {apart}, received "
                f"{count}: a larger stride would reach these places. Write output_padding={max(step, apart) - 1}."
            )


def _must_be_left(
    name: str, x: jax.Array, spans: Sequence[int], stride: Sequence[int], cuts: Sequence[tuple[int, int]]
) -> None:
    made = [(n - 1) * s + span for n, s, span in zip(x.shape[1:-1], stride, spans, strict=True)]
    if any(n <= low + high for n, (low, high) in zip(made, cuts, strict=True)):
        raise ValueError(
            f"{here(name)} makes {' x '.join(map(str, made))} positions of {tree.describe(x)}, and its padding cuts "
            "all of an axis. Use a smaller padding, or a larger input."
        )
