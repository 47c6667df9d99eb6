"""Convolutions, channels last."""

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
    """The convolution of sequences ``[batch, length, in_channels]`` to ``[batch, length', out_channels]``.

    As everywhere in deep learning the kernel is not flipped (a cross-correlation). Parameters: ``weight``
    ``[kernel_size, in_channels / groups, out_channels]`` and, unless ``bias=False``, ``bias`` ``[out_channels]``.

    Arguments:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        kernel_size: default 3.
        stride: step between outputs, default 1.
        dilation: step between the inputs that one output sees, default 1.
        padding: ``"SAME"`` (default) pads with zeros on both sides, the odd one at the end: ``length' =
            ceil(length / stride)``. ``"CAUSAL"`` pads at the start alone, so no output sees a later input; equal
            length'. ``"VALID"`` pads nothing: ``length' = ceil((length - (kernel_size - 1) * dilation) / stride)``.
        groups: channels are split into this many groups that do not see each other, default 1.
        bias: whether a bias is added, default True.
        weight_init, bias_init: from ``jax.nn.initializers``, default ``glorot_uniform()`` and ``zeros``.

    Raises:
        TypeError: a size is not an int; applied, another dtype.
        ValueError: a size below 1, channels that ``groups`` does not divide, an unknown padding; applied, another
            shape, or under ``"VALID"`` fewer positions than the kernel reaches over.

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
    """The convolution of images ``[batch, height, width, in_channels]`` to ``[batch, height', width', out_channels]``.

    As everywhere in deep learning the kernel is not flipped (a cross-correlation). Parameters: ``weight``
    ``[kernel height, kernel width, in_channels / groups, out_channels]`` (HWIO) and, unless ``bias=False``, ``bias``
    ``[out_channels]``.

    Arguments:
        in_channels: size of the input's last axis.
        out_channels: size of the output's last axis.
        kernel_size: an int or ``(height, width)``, default (3, 3); ``stride`` and ``dilation`` likewise.
        stride: step between outputs, default 1.
        dilation: step between the inputs that one output sees, default 1.
        padding: ``"SAME"`` (default) pads with zeros on both sides, the odd one at the bottom and right: ``height' =
            ceil(height / stride)``. ``"VALID"`` pads nothing.
        groups: channels are split into this many groups that do not see each other, default 1.
        bias: whether a bias is added, default True.
        weight_init, bias_init: from ``jax.nn.initializers``, default ``glorot_uniform()`` and ``zeros``.

    Raises:
        TypeError: a size is not an int; applied, another dtype.
        ValueError: a size below 1, channels that ``groups`` does not divide, an unknown padding; applied, another
            shape, or under ``"VALID"`` an image smaller than the kernel reaches over.

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
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        if padding == "VALID":
            _must_fit(name, x, reach)
        y = _convolved(x, vars.params["weight"], stride, dilation, padding, groups)
        if bias:
            y = y + along_last(vars.params["bias"], y.ndim)
        return y, vars

    return Layer(init=init, apply=apply, name=name)


def _convolved(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], dilation: tuple[int, ...], padding: str, groups: int
) -> jax.Array:
    if x.ndim == 3:  # a sequence is an image of one row
        return _convolved(x[:, None], weight[None], (1, *stride), (1, *dilation), padding, groups)[:, 0]
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[:2], dilation, strict=True)]
    if padding == "CAUSAL":
        pads = [(r - 1, 0) for r in reach]
    else:
        pads = lax.padtype_to_pads(x.shape[1:3], reach, stride, padding)
    windows = ConvConfig((stride[0], stride[1]), (dilation[0], dilation[1]), pads)
    dtype = accumulation_dtype(x.dtype)
    return convolve(x.astype(dtype), weight.astype(dtype), windows, groups).astype(x.dtype)


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
        hint = " Causal padding is conv1d's." if padding == "CAUSAL" else ""
        raise ValueError(
            f"{head}(padding=...) expected one of {', '.join(map(repr, known))}, received {padding!r}.{hint} For other "
            'paddings put layers.fn(lambda x: jnp.pad(x, ...)) before it and use padding="VALID".'
        )
    return padding


def _must_fit(name: str, x: jax.Array, reach: Sequence[int]) -> None:
    if any(r > n for r, n in zip(reach, x.shape[1:-1], strict=True)):
        raise ValueError(
            f"{here(name)} reaches over {' x '.join(map(str, reach))} positions and pads nothing, received "
            f'{tree.describe(x)}: no output would be left. Use padding="SAME" or a smaller kernel.'
        )
