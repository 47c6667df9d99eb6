"""The linear layer."""

from __future__ import annotations

from typing import Any

import jax

from kaun._calls import explained
from kaun._kernels import matmul
from kaun.context import Context
from kaun.layers.arguments import along_last, call_text, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_affine
from kaun.layers.inputs import float_input

__all__ = ["linear"]


@explained("layers.linear")
def linear(
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make the layer ``x @ weight + bias`` over the last axis, with any number of leading axes.

    The input is ``[..., in_features]`` in the model's dtype, the output ``[..., out_features]``. Parameters: ``weight``
    ``[in_features, out_features]`` and, unless ``bias=False``, ``bias`` ``[out_features]``.

    Args:
        in_features: Size of the input's last axis.
        out_features: Size of the output's last axis.
        bias: Whether a bias is added. Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        bias_init: Initializer of ``bias``, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If a size is not an int; in ``init``, if an initializer does not return an array; when applied, if
            the input has another dtype.
        ValueError: If a size is below 1; when applied, if the last axis has another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.linear(3, 2)
        >>> variables = layer.init(dtype=jnp.float32)
        >>> y, _ = layer.apply(variables, jnp.ones((5, 7, 3)))
        >>> y.shape, variables.params["weight"].shape
        ((5, 7, 2), (3, 2))
    """
    fan_in, fan_out = size("linear", "in_features", in_features), size("linear", "out_features", out_features)
    name = call_text(linear, in_features=fan_in, out_features=fan_out, bias=bias)

    def init(*, dtype: Any) -> Vars:
        params = init_affine(name, weight_init, (fan_in, fan_out), bias_init if bias else None, dtype)
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=fan_in)
        y = matmul(x, vars.params["weight"])
        if bias:
            y = y + along_last(vars.params["bias"], y.ndim)
        return y, vars

    return Layer(init=init, apply=apply, name=name)
