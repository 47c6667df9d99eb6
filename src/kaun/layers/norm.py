"""Normalization over features, groups of channels, or the batch.

In half precision all layers sum in float32; their output has the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._calls import explained, public
from kaun._kernels import normalize
from kaun.context import Context
from kaun.layers.arguments import accumulation_dtype, along_last, call_text, fraction, positive, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


@explained("layers.layer_norm")
def layer_norm(dim: int, eps: float = 1e-5, bias: bool = True) -> Layer[Float, Float]:
    """Make the layer that normalizes the last axis to mean 0 and variance 1, then scales and shifts (Ba et al., 2016).

    ``(x - mean) / sqrt(var + eps) * weight + bias`` with the biased variance. Input and output are ``[..., dim]`` in
    the model's dtype. Parameters: ``weight`` (ones) and, unless ``bias=False``, ``bias`` (zeros), ``[dim]``.

    Args:
        dim: Size of the last axis.
        eps: Added to the variance. Default: 1e-5.
        bias: Whether a bias is added. Default: True.

    Raises:
        TypeError: If an argument is not a number; when applied, if the input has another dtype.
        ValueError: If ``dim`` is below 1 or ``eps`` not above 0; when applied, if the last axis has another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.layer_norm(4)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([[2.0, 2.0, 6.0, 6.0]]))
        >>> y.round(3)
        Array([[-1., -1.,  1.,  1.]], dtype=float32)
    """
    dim, eps = size("layer_norm", "dim", dim), positive("layer_norm", "eps", eps)
    name = call_text(layer_norm, dim=dim, eps=eps, bias=bias)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=dim)
        return _normal(x, vars, (x.ndim - 1,), eps), vars

    return Layer(init=_weight_and_bias(dim) if bias else _weight(dim), apply=apply, name=name)


@explained("layers.rms_norm", "layers.layer_norm")
def rms_norm(dim: int, eps: float = 1e-6) -> Layer[Float, Float]:
    """Make the layer that divides the last axis by its root mean square, then scales (Zhang and Sennrich, 2019).

    ``x / sqrt(mean(x**2) + eps) * weight``. Input and output are ``[..., dim]`` in the model's dtype. Parameter:
    ``weight`` (ones), ``[dim]``.

    Args:
        dim: Size of the last axis.
        eps: Added to the mean square. Default: 1e-6.

    Raises:
        TypeError: If an argument is not a number; when applied, if the input has another dtype.
        ValueError: If ``dim`` is below 1 or ``eps`` not above 0; when applied, if the last axis has another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.rms_norm(2)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([[1.0, 7.0]]))
        >>> [f"{v:.3f}" for v in y[0]]
        ['0.200', '1.400']
    """
    dim, eps = size("rms_norm", "dim", dim), positive("rms_norm", "eps", eps)
    name = call_text(rms_norm, dim=dim, eps=eps)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=dim)
        return _normal(x, vars, (x.ndim - 1,), eps, is_centred=False), vars

    return Layer(init=_weight(dim), apply=apply, name=name)


@public
def group_norm(num_groups: int, num_channels: int, eps: float = 1e-5) -> Layer[Float, Float]:
    """Make the layer that normalizes each group of channels of each item to mean 0 and variance 1 (Wu and He, 2018).

    The statistics are taken over the channels of the group and all axes between the batch and the channels; the
    variance is the biased one. Input and output are ``[batch, ..., num_channels]`` in the model's dtype. Parameters:
    ``weight`` (ones) and ``bias`` (zeros), ``[num_channels]``, one for each channel.

    Args:
        num_groups: Number of groups, a divisor of ``num_channels``.
        num_channels: Size of the last axis.
        eps: Added to the variance. Default: 1e-5.

    Raises:
        TypeError: If an argument is not a number; when applied, if the input has another dtype.
        ValueError: If a size is below 1, ``num_groups`` does not divide ``num_channels``, or ``eps`` is not above 0;
            when applied, if the input has another number of channels, or no batch axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.group_norm(2, 4)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([[1.0, 3.0, 10.0, 30.0]]))
        >>> y.round(3)
        Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    groups, channels = size("group_norm", "num_groups", num_groups), size("group_norm", "num_channels", num_channels)
    eps = positive("group_norm", "eps", eps)
    if channels % groups:
        raise ValueError(
            f"group_norm(num_groups={groups}, num_channels={channels}): the groups must divide the channels evenly, "
            f"received {channels} / {groups} = {channels / groups:g}. "
            f"Write num_groups={math.gcd(groups, channels)}, for example."
        )
    name = call_text(group_norm, num_groups=groups, num_channels=channels, eps=eps)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=channels, layout="batch, ...")
        if x.ndim < 2:
            raise ValueError(
                f"{here(name)} expected [batch, ..., {channels}], received {tree.describe(x)}: there is no batch axis. "
                "Add one, x[None]."
            )
        split = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), groups, channels // groups)
        return _normal(split, vars, (1, 3), eps).reshape(x.shape), vars

    return Layer(init=_weight_and_bias(channels), apply=apply, name=name)


@public
def instance_norm(num_channels: int, eps: float = 1e-5) -> Layer[Float, Float]:
    """Make the layer that normalizes each channel of each item to mean 0 and variance 1 (Ulyanov et al., 2016).

    The statistics are taken over all axes between the batch and the channels; the variance is the biased one. Input and
    output are ``[batch, ..., num_channels]`` in the model's dtype. Parameters: ``weight`` (ones) and ``bias`` (zeros),
    ``[num_channels]``, as PyTorch's ``InstanceNorm2d(affine=True)`` has them. There are no running statistics.

    Args:
        num_channels: Size of the last axis.
        eps: Added to the variance. Default: 1e-5.

    Raises:
        TypeError: If an argument is not a number; when applied, if the input has another dtype.
        ValueError: If ``num_channels`` is below 1 or ``eps`` not above 0; when applied, if the input has another number
            of channels, or fewer than two places for each.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.instance_norm(2)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([[[1.0, 10.0], [3.0, 30.0]]]))
        >>> y.round(3)
        Array([[[-1., -1.],
                [ 1.,  1.]]], dtype=float32)
    """
    channels, eps = size("instance_norm", "num_channels", num_channels), positive("instance_norm", "eps", eps)
    name = call_text(instance_norm, num_channels=channels, eps=eps)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=channels, layout="batch, ...")
        if x.ndim < 3 or math.prod(x.shape[1:-1]) < 2:
            raise ValueError(
                f"{here(name)} expected [batch, ..., {channels}] with two or more places in between, received "
                f"{tree.describe(x)}: the output would not depend on the input. Write layers.layer_norm({channels})."
            )
        return _normal(x, vars, range(1, x.ndim - 1), eps), vars

    return Layer(init=_weight_and_bias(channels), apply=apply, name=name)


@explained("layers.batch_norm")
def batch_norm(num_features: int, momentum: float = 0.99, eps: float = 1e-5) -> Layer[Float, Float]:
    """Make the layer that normalizes each feature to mean 0 and variance 1 over the batch (Ioffe and Szegedy, 2015).

    Input and output are ``[..., num_features]`` in the model's dtype. In training the statistics are those of the
    batch, over all axes but the last, and the running statistics are updated: ``running = momentum * running + (1 -
    momentum) * batch``. In evaluation the running statistics are used, and not updated. Parameters: ``weight`` (ones)
    and ``bias`` (zeros); state: ``running_mean`` (zeros) and ``running_var`` (ones); each ``[num_features]``.

    Both variances are the biased ones, as in Keras and Flax. PyTorch's running variance is larger by n / (n - 1), and
    its momentum is one minus this one. In a half-precision model the state is kept in float32, because an update by 1
    percent would be lost to rounding.

    In training the layer reads ``ctx["row_mask"]``, bool [batch], which ``Data.batches(..., pad=True)`` adds: rows that
    are False are left out of the statistics.
    ``averages.update_statistics`` sets the name ``statistics_rows`` in the context, int32 [2]: the rows of the batches
    before this one, and of this one. The running statistics are then updated to the mean over all these rows.

    Args:
        num_features: Size of the last axis.
        momentum: Weight of the old running statistics in an update, in [0, 1). Default: 0.99.
        eps: Added to the variance. Default: 1e-5.

    Raises:
        TypeError: If an argument is not a number; when applied, if the input has another dtype.
        ValueError: If ``num_features`` is below 1, ``eps`` not above 0, or ``momentum`` outside [0, 1); when applied,
            if the last axis has another size, or in training there are fewer than two values for each feature, or the
            context has a ``row_mask`` of another shape or dtype.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.batch_norm(1)
        >>> variables = layer.init(dtype=jnp.float32)
        >>> y, after = layer.apply(variables, jnp.array([[2.0], [4.0]]), training=True)
        >>> y.round(3).ravel(), after.state["running_mean"].round(3)
        (Array([-1.,  1.], dtype=float32), Array([0.03], dtype=float32))
    """
    features, eps = size("batch_norm", "num_features", num_features), positive("batch_norm", "eps", eps)
    momentum = fraction("batch_norm", "momentum", momentum)
    name = call_text(batch_norm, num_features=features, momentum=momentum, eps=eps)

    def init(*, dtype: Any) -> Vars:
        params = _weight_and_bias(features)(dtype=dtype).params
        state = {
            "running_mean": jnp.zeros(features, accumulation_dtype(dtype)),
            "running_var": jnp.ones(features, accumulation_dtype(dtype)),
        }
        return Vars(params=params, state=state, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=features)
        state, dtype, row_mask = vars.state, accumulation_dtype(x.dtype), ctx.get("row_mask")
        if not training:
            mean, var = (state[key].astype(dtype) for key in ("running_mean", "running_var"))
            return _normalized(x, mean, var, eps, vars), vars
        _check_count(name, x)
        if row_mask is None:
            y, mean, var = _normal_and_statistics(x, vars, range(x.ndim - 1), eps)
            mean, var = mean.reshape(features), var.reshape(features)
        else:
            mean, var = _masked_statistics(name, x, row_mask)
            y = _normalized(x, mean, var, eps, vars)
        keep: Any = momentum
        if "statistics_rows" in ctx:
            rows = ctx["statistics_rows"].astype(dtype)
            keep = rows[0] / rows.sum()
        means, variances = _updated(state["running_mean"], mean, keep), _updated(state["running_var"], var, keep)
        return y, vars.replace(state={"running_mean": means, "running_var": variances})

    return Layer(init=init, apply=apply, name=name)


def _weight(dim: int) -> Any:
    def init(*, dtype: Any) -> Vars:
        return Vars(params={"weight": jnp.ones(dim, dtype)}, state={}, dtype=dtype)

    return init


def _weight_and_bias(dim: int) -> Any:
    def init(*, dtype: Any) -> Vars:
        return Vars(params={"weight": jnp.ones(dim, dtype), "bias": jnp.zeros(dim, dtype)}, state={}, dtype=dtype)

    return init


def _normal(x: jax.Array, vars: Vars, axes: Sequence[int], eps: float, *, is_centred: bool = True) -> jax.Array:
    """``x`` normalized over ``axes``, then scaled and shifted, in the model's dtype."""
    return _normal_and_statistics(x, vars, axes, eps, is_centred)[0]


def _normal_and_statistics(
    x: jax.Array, vars: Vars, axes: Sequence[int], eps: float, is_centred: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    y, mean, variance = normalize(x, _of_channels("weight", vars, x), axes, eps, is_centred)
    if "bias" in vars.params:
        y = y + _of_channels("bias", vars, x)
    return y.astype(vars.dtype), mean, variance


def _of_channels(key: str, vars: Vars, x: jax.Array) -> jax.Array:
    """A parameter along the channels of ``x``, which are the last axis, or the last two of a group norm."""
    vector = vars.params[key].astype(accumulation_dtype(x.dtype))
    split = x.shape[-1:] if vector.size == x.shape[-1] else x.shape[-2:]
    return jax.lax.expand_dims(vector.reshape(split), range(x.ndim - len(split)))


def _normalized(x: jax.Array, mean: jax.Array, var: jax.Array, eps: float, vars: Vars) -> jax.Array:
    mean, var = along_last(mean, x.ndim), along_last(var, x.ndim)
    z = jax.nn.standardize(x.astype(mean.dtype), mean=mean, variance=var, epsilon=eps)
    return (z * _of_channels("weight", vars, x) + _of_channels("bias", vars, x)).astype(vars.dtype)


def _check_count(name: str, x: jax.Array) -> None:
    count = math.prod(x.shape[:-1])
    if count < 2:
        raise ValueError(
            f"{here(name)} expected two or more values for each feature in training, received {tree.describe(x)}, "
            f"{count} for each: the output would not depend on the input. Drop a last batch of one example with "
            "Data.batches(..., drop_last=True), or use layers.layer_norm."
        )


def _masked_statistics(name: str, x: jax.Array, row_mask: Any) -> tuple[jax.Array, jax.Array]:
    z, axes = x.astype(accumulation_dtype(x.dtype)), tuple(range(x.ndim - 1))
    mask = jnp.asarray(row_mask)
    if mask.shape != x.shape[:1] or mask.dtype != jnp.bool_:
        raise ValueError(
            f"{here(name)} expected ctx['row_mask'] as bool[{x.shape[0]}], one for each row of {tree.describe(x)}, "
            f"received {tree.describe(mask)}. Keep the axis of rows first in the layers before, or train on batches "
            "without pad=True."
        )
    mask = jnp.expand_dims(mask, tuple(range(1, x.ndim)))
    total = jnp.maximum(mask.sum(), 1).astype(z.dtype) * math.prod(x.shape[1:-1])
    mean = jnp.where(mask, z, 0).sum(axis=axes) / total
    centred = jnp.where(mask, z - along_last(mean, x.ndim), 0)
    return mean, (centred * centred).sum(axis=axes) / total


def _updated(running: jax.Array, batch: jax.Array, keep: Any) -> jax.Array:
    # In the dtype that it had, so that the state has the same type after each step. With one product: of a sum of two
    # XLA:CPU rounds the one or the other, depending on the kernel, and steps of an ensemble had other bits than a fit.
    return (batch + keep * (running.astype(batch.dtype) - batch)).astype(running.dtype)
