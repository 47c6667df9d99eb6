"""Initial parameters, drawn by an initializer and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._calls import shown

Initializer = Callable[..., Any]
"""A function ``(key, shape, dtype) -> array``, as those of ``jax.nn.initializers``."""

GLOROT_UNIFORM: Initializer = jax.nn.initializers.glorot_uniform()


def init_param(
    layer: str, what: str, initializer: Initializer, shape: tuple[int, ...], dtype: Any, groups: int = 1
) -> jax.Array:
    """Draw a parameter of this shape and dtype with an initializer and the next key of the RNG scope.

    With groups, which divide the last axis, each is drawn on its own: an initializer reads the fans off the shape, and
    all outputs together would count as the fan-out of one group, which makes depthwise weights far too small.

    Raises:
        TypeError: If the initializer is not callable, or does not return an array of that shape and dtype.
    """
    if groups > 1:
        part = (*shape[:-1], shape[-1] // groups)
        draw = lambda key: _drawn(layer, what, initializer, key, part, dtype)
        return jnp.moveaxis(jax.vmap(draw)(jax.random.split(rng.next_key(), groups)), 0, -2).reshape(shape)
    return _drawn(layer, what, initializer, None, shape, dtype)


def init_affine(
    layer: str, weight_init: Initializer, shape: tuple[int, ...], bias_init: Initializer | None, dtype: Any,
    groups: int = 1,
) -> dict[str, jax.Array]:  # fmt: skip
    """Draw ``weight`` of this shape and, unless ``bias_init`` is None, ``bias`` of its last axis."""
    params = {"weight": init_param(layer, "weight_init", weight_init, shape, dtype, groups)}
    if bias_init is not None:
        params["bias"] = init_param(layer, "bias_init", bias_init, shape[-1:], dtype)
    return params


def _drawn(layer: str, what: str, initializer: Initializer, key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    wanted = f"float array {jnp.dtype(dtype).name}{list(shape)}"
    fix = f"Write {what}=jax.nn.initializers.normal(0.02), or a function (key, shape, dtype) -> array."
    if not callable(initializer):
        raise TypeError(f"{layer}({what}=...) expected an initializer, received {shown(initializer)}. {fix}")
    made = initializer(rng.next_key() if key is None else key, shape, dtype)
    if callable(made):
        # jax.nn.initializers has both kinds: zeros is an initializer, glorot_uniform() makes one.
        raise TypeError(
            f"{layer}({what}=...) returned a function, not a {wanted}: call it once, {what}={_called(initializer)}."
        )
    if not tree.is_array(made) or made.shape != shape or made.dtype != dtype:
        raise TypeError(f"{layer}({what}=...) must return a {wanted}, received {tree.describe(made)}. {fix}")
    return jnp.asarray(made)


def _called(function: Any) -> str:
    return f"{getattr(function, '__name__', 'initializer')}()"
