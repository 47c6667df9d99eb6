"""Convolutions of sequences, images and volumes, channels last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from kaun._calls import explained
from kaun._kernels import ConvConfig, convolve
from kaun.context import Context
from kaun.layers.arguments import AXES, accumulation_dtype, along_last, call_text, size, sizes
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_affine
from kaun.layers.inputs import float_input
from kaun.layers.padding import must_fit, padding_of, pads_of

__all__ = ["conv1d", "conv2d", "conv3d", "on_images"]

Kernel = Callable[[jax.Array, jax.Array, ConvConfig], jax.Array]


@explained("layers.conv1d", "layers.conv")
def conv1d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: Literal["SAME", "VALID", "CAUSAL"] | int | tuple[int, int] = "SAME",
    groups: int = 1,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make the convolution of sequences ``[batch, length, in_channels]`` to ``[batch, length', out_channels]``.

    As usual in deep learning the kernel is not flipped (a cross-correlation). Parameters: ``weight``
    ``[kernel_size, in_channels / groups, out_channels]`` and, unless ``bias=False``, ``bias`` ``[out_channels]``.

    Args:
        in_channels: Size of the input's last axis.
        out_channels: Size of the output's last axis.
        kernel_size: Number of positions in the kernel. Default: 3.
        stride: Step between outputs. Default: 1.
        dilation: Step between the inputs of one output. Default: 1.
        padding: ``"SAME"`` (default) pads with zeros on both sides, with the larger part at the end: ``length' =
            ceil(length / stride)``. ``"CAUSAL"`` pads only at the start, so that no output depends on a later input;
            length' is the same. ``"VALID"`` does not pad: ``length' = ceil((length - (kernel_size - 1) * dilation) /
            stride)``. An int is the number of zeros at each end, as in PyTorch; a pair ``(before, after)`` those at
            the start and at the end.
        groups: Number of groups of channels; an output depends only on the inputs of its group. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``. With
            groups it draws each group's weight, ``[kernel_size, in_channels / groups, out_channels / groups]``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int, or the padding has another form; when applied, if the input has another
            dtype.
        ValueError: If a size is below 1, ``groups`` does not divide the channels, or the padding is unknown or below 0;
            when applied, if the input has another shape, or with its padding fewer positions than the kernel spans.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.conv1d(3, 8, kernel_size=5, padding="CAUSAL")
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 10, 3)))
        >>> y.shape
        (2, 10, 8)
    """
    name = call_text(
        conv1d, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
        dilation=dilation, padding=padding, groups=groups, bias=bias,
    )  # fmt: skip
    return _convolution(
        name, in_channels, out_channels, kernel_size, stride, dilation, padding, groups, bias, weight_init, bias_init, 1
    )


@explained("layers.conv2d", "layers.conv")
def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = (3, 3),
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: Literal["SAME", "VALID"] | int | Sequence[tuple[int, int]] = "SAME",
    groups: int = 1,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make the convolution of images: ``[batch, height, width, in_channels]`` to ``[..., out_channels]``.

    The output is ``[batch, height', width', out_channels]``. As usual in deep learning the kernel is not flipped (a
    cross-correlation). Parameters: ``weight`` ``[kernel height, kernel width, in_channels / groups, out_channels]``
    (HWIO) and, unless ``bias=False``, ``bias`` ``[out_channels]``.

    Args:
        in_channels: Size of the input's last axis.
        out_channels: Size of the output's last axis.
        kernel_size: Size of the kernel, an int or ``(height, width)``. Default: (3, 3).
        stride: Step between outputs, an int or ``(height, width)``. Default: 1.
        dilation: Step between the inputs of one output, an int or ``(height, width)``. Default: 1.
        padding: ``"SAME"`` (default) pads with zeros on both sides, with the larger part at the bottom and right:
            ``height' = ceil(height / stride)``. ``"VALID"`` does not pad. An int is the number of zeros at each end of
            both axes, as in PyTorch; ``((top, bottom), (left, right))`` gives each of them.
        groups: Number of groups of channels; an output depends only on the inputs of its group. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``. With
            groups it draws each group's weight, ``[height, width, in_channels / groups, out_channels / groups]``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int, or the padding has another form; when applied, if the input has another
            dtype.
        ValueError: If a size is below 1, ``groups`` does not divide the channels, or the padding is unknown or below 0;
            when applied, if the input has another shape, or with its padding is smaller than the kernel spans.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.conv2d(1, 16, kernel_size=5, stride=2)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 28, 28, 1)))
        >>> y.shape
        (2, 14, 14, 16)
    """
    name = call_text(
        conv2d, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
        dilation=dilation, padding=padding, groups=groups, bias=bias,
    )  # fmt: skip
    return _convolution(
        name, in_channels, out_channels, kernel_size, stride, dilation, padding, groups, bias, weight_init, bias_init, 2
    )


@explained("layers.conv3d", "layers.conv")
def conv3d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = (3, 3, 3),
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: Literal["SAME", "VALID"] | int | Sequence[tuple[int, int]] = "SAME",
    groups: int = 1,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make the convolution of volumes or videos: ``[batch, depth, height, width, in_channels]``.

    The output is ``[batch, depth', height', width', out_channels]``. Parameters: ``weight`` ``[kernel depth, kernel
    height, kernel width, in_channels / groups, out_channels]`` (DHWIO) and, unless ``bias=False``, ``bias``
    ``[out_channels]``.

    Args:
        in_channels: Size of the input's last axis.
        out_channels: Size of the output's last axis.
        kernel_size: Size of the kernel, an int or ``(depth, height, width)``. Default: (3, 3, 3).
        stride: Step between outputs, an int or one for each axis. Default: 1.
        dilation: Step between the inputs of one output, an int or one for each axis. Default: 1.
        padding: As for ``conv2d``, with three pairs. Default: ``"SAME"``.
        groups: Number of groups of channels; an output depends only on the inputs of its group. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, as for ``conv2d``. Default: ``glorot_uniform()``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int, or the padding has another form; when applied, if the input has another
            dtype.
        ValueError: If a size is below 1, ``groups`` does not divide the channels, or the padding is unknown or below 0;
            when applied, if the input has another shape, or with its padding is smaller than the kernel spans.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.conv3d(1, 4, kernel_size=(1, 3, 3), stride=(1, 2, 2))
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 3, 8, 8, 1)))
        >>> y.shape
        (2, 3, 4, 4, 4)
    """
    name = call_text(
        conv3d, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride,
        dilation=dilation, padding=padding, groups=groups, bias=bias,
    )  # fmt: skip
    return _convolution(
        name, in_channels, out_channels, kernel_size, stride, dilation, padding, groups, bias, weight_init, bias_init, 3
    )


def _convolution(
    name: str, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, dilation: Any, padding: Any,
    groups: int, bias: bool, weight_init: Initializer, bias_init: Initializer, axes: int,
) -> Layer[Float, Float]:  # fmt: skip
    head = name.split("(", 1)[0]
    kernel, stride = sizes(head, "kernel_size", kernel_size, axes), sizes(head, "stride", stride, axes)
    dilation = sizes(head, "dilation", dilation, axes)
    words = ("SAME", "VALID", "CAUSAL") if axes == 1 else ("SAME", "VALID")
    padding = padding_of(head, padding, axes, words)
    channels, filters, groups = _channels(head, in_channels, out_channels, groups)
    shape = (*kernel, channels // groups, filters)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]

    def init(*, dtype: Any) -> Vars:
        params = init_affine(name, weight_init, shape, bias_init if bias else None, dtype, groups)
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=channels, ndim=axes + 2, layout=f"batch, {AXES[axes]}")
        pads = pads_of(padding, x.shape[1:-1], spans, stride)
        if padding not in ("SAME", "CAUSAL"):
            must_fit(name, x, spans, pads)
        y = on_images(
            functools.partial(convolve, groups=groups), x, vars.params["weight"], ConvConfig(stride, dilation, pads)
        )
        if bias:
            y = y + along_last(vars.params["bias"], y.ndim)
        return y, vars

    return Layer(init=init, apply=apply, name=name)


def on_images(kernel: Kernel, x: jax.Array, weight: jax.Array, config: ConvConfig) -> jax.Array:
    """Return what a kernel of images computes, in its dtype of sums; a sequence is an image with one row."""
    if x.ndim == 3:
        row = ConvConfig((1, *config.stride), (1, *config.dilation), [(0, 0), *config.padding])
        return on_images(kernel, x[:, None], weight[None], row)[:, 0]
    dtype = accumulation_dtype(x.dtype)
    return kernel(x.astype(dtype), weight.astype(dtype), config).astype(x.dtype)


def _channels(head: str, in_channels: int, out_channels: int, groups: int) -> tuple[int, int, int]:
    channels, filters = size(head, "in_channels", in_channels), size(head, "out_channels", out_channels)
    groups = size(head, "groups", groups)
    for what, count in (("in_channels", channels), ("out_channels", filters)):
        if count % groups:
            raise ValueError(
                f"{head}({what}={count}, groups={groups}): the groups must divide the channels evenly, received "
                f"{count} / {groups} = {count / groups:g}. Write {what}={-(-count // groups) * groups}, for example."
            )
    return channels, filters, groups
