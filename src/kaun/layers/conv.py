"""Convolutions of sequences and images, channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax import lax

from kaun import tree
from kaun._kernels import ConvConfig, convolve
from kaun.context import Context
from kaun.layers.arguments import accumulation_dtype, along_last, call_text, pair, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_param
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = ["conv1d", "conv2d"]


def conv1d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: Literal["SAME", "VALID", "CAUSAL"] = "SAME",
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
            stride)``.
        groups: Number of groups of channels; an output depends only on the inputs of its group. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input has another dtype.
        ValueError: If a size is below 1, ``groups`` does not divide the channels, or the padding is unknown; when
            applied, if the input has another shape, or with ``"VALID"`` fewer positions than the kernel spans.

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
        name, in_channels, out_channels, (size("conv1d", "kernel_size", kernel_size),),
        stride=(size("conv1d", "stride", stride),), dilation=(size("conv1d", "dilation", dilation),),
        padding=_padding("conv1d", padding, ("SAME", "VALID", "CAUSAL")), groups=groups, bias=bias,
        weight_init=weight_init, bias_init=bias_init,
    )  # fmt: skip


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = (3, 3),
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: Literal["SAME", "VALID"] = "SAME",
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
            ``height' = ceil(height / stride)``. ``"VALID"`` does not pad.
        groups: Number of groups of channels; an output depends only on the inputs of its group. Default: 1.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input has another dtype.
        ValueError: If a size is below 1, ``groups`` does not divide the channels, or the padding is unknown; when
            applied, if the input has another shape, or with ``"VALID"`` is smaller than the kernel spans.

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
        name, in_channels, out_channels, pair("conv2d", "kernel_size", kernel_size),
        stride=pair("conv2d", "stride", stride), dilation=pair("conv2d", "dilation", dilation),
        padding=_padding("conv2d", padding, ("SAME", "VALID")), groups=groups, bias=bias,
        weight_init=weight_init, bias_init=bias_init,
    )  # fmt: skip


_LAYOUTS = {1: "batch, length", 2: "batch, height, width"}


def _convolution(
    name: str,
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str,
    groups: int,
    bias: bool,
    weight_init: Initializer,
    bias_init: Initializer,
) -> Layer[Float, Float]:
    channels, filters, groups = _channels(name.split("(", 1)[0], in_channels, out_channels, groups)
    shape = (*kernel, channels // groups, filters)
    layout = _LAYOUTS[len(kernel)]

    def init(*, dtype: Any) -> Vars:
        params = {"weight": init_param(name, "weight_init", weight_init, shape, dtype)}
        if bias:
            params["bias"] = init_param(name, "bias_init", bias_init, (filters,), dtype)
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=channels, ndim=len(shape), layout=layout)
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        if padding == "VALID":
            _must_fit(name, x, spans)
        y = _convolved(x, vars.params["weight"], stride, dilation, padding, groups)
        if bias:
            y = y + along_last(vars.params["bias"], y.ndim)
        return y, vars

    return Layer(init=init, apply=apply, name=name)


def _convolved(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], dilation: tuple[int, ...], padding: str, groups: int
) -> jax.Array:
    if x.ndim == 3:  # a sequence is computed as an image with one row
        return _convolved(x[:, None], weight[None], (1, *stride), (1, *dilation), padding, groups)[:, 0]
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[:2], dilation, strict=True)]
    if padding == "CAUSAL":
        pads = [(span - 1, 0) for span in spans]
    else:
        pads = lax.padtype_to_pads(x.shape[1:3], spans, stride, padding)
    config = ConvConfig((stride[0], stride[1]), (dilation[0], dilation[1]), pads)
    dtype = accumulation_dtype(x.dtype)
    return convolve(x.astype(dtype), weight.astype(dtype), config, groups).astype(x.dtype)


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


def _padding(head: str, padding: Any, known: tuple[str, ...]) -> str:
    if padding not in known:
        hint = " Only conv1d has causal padding." if padding == "CAUSAL" else ""
        raise ValueError(
            f"{head}(padding=...) expected one of {', '.join(map(repr, known))}, received {padding!r}.{hint} For other "
            'paddings put layers.fn(lambda x: jnp.pad(x, ...)) before it and write padding="VALID".'
        )
    return padding


def _must_fit(name: str, x: jax.Array, spans: Sequence[int]) -> None:
    if any(span > n for span, n in zip(spans, x.shape[1:-1], strict=True)):
        raise ValueError(
            f"{here(name)} expected at least {' x '.join(map(str, spans))} positions, which its kernel spans, received "
            f'{tree.describe(x)}. Write padding="SAME", or use a smaller kernel.'
        )
