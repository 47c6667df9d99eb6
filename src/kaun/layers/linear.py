"""The linear layer."""

from __future__ import annotations

from typing import Any

import jax

from kaun._kernels import matmul
from kaun.context import Context
from kaun.layers.arguments import along_last, call_text, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_param
from kaun.layers.inputs import float_input

__all__ = ["linear"]


def linear(
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """The layer ``x @ weight + bias`` on the last axis, under any number of leading ones.

    Input ``[..., in_features]`` in the model's dtype, output ``[..., out_features]``. Parameters: ``weight``
    ``[in_features, out_features]`` and, unless ``bias=False``, ``bias`` ``[out_features]``.

    Arguments:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        bias: whether a bias is added, default True.
        weight_init: from ``jax.nn.initializers``, default ``glorot_uniform()``.
        bias_init: from ``jax.nn.initializers``, default ``zeros``.

    Raises:
        TypeError: a size is not an int; at init, an initializer returns no array; applied, another dtype.
        ValueError: a size below 1; applied, another width.

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
        params = {"weight": init_param(name, "weight_init", weight_init, (fan_in, fan_out), dtype)}
        if bias:
            params["bias"] = init_param(name, "bias_init", bias_init, (fan_out,), dtype)
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=fan_in)
        y = matmul(x, vars.params["weight"])
        if bias:
            y = y + along_last(vars.params["bias"], y.ndim)
        return y, vars

    return Layer(init=init, apply=apply, name=name)
