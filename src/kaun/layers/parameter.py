"""A parameter as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kaun._calls import public
from kaun.context import Context
from kaun.layers.arguments import size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import Initializer, init_param

__all__ = ["parameter"]


@public
def parameter(shape: int | Sequence[int], *, init: Initializer = jax.nn.initializers.zeros) -> Layer[Any, Float]:
    """Make the layer that ignores its input and returns its parameter, an array of this shape in the model's dtype.

    It is meant for ``layers.module``, where ``m.name()`` reads it: class tokens, mixing weights, constants that are
    fitted. Parameter: ``weight``.

    Args:
        shape: The shape, an int or a sequence of ints; ``()`` for one number.
        init: Initializer, from ``jax.nn.initializers``. Default: ``zeros``.

    Raises:
        TypeError: If ``shape`` has something else than ints; in ``init``, if the initializer does not return an array.
        ValueError: If a length is below 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from kaun import layers
        >>> parts = {"scale": layers.parameter((3,), init=jax.nn.initializers.ones)}
        >>> model = layers.module(parts, lambda m, x: x * m.scale()[None])
        >>> model.apply(model.init(dtype=jnp.float32), jnp.array([[1.0, 2.0, 3.0]]))[0]
        Array([[1., 2., 3.]], dtype=float32)
    """
    whole = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
    lengths = tuple(size("parameter", "shape", length) for length in whole)
    name = f"parameter({lengths})"

    def init_vars(*, dtype: Any) -> Vars:
        return Vars(params={"weight": init_param(name, "init", init, lengths, dtype)}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        return jnp.asarray(vars.params["weight"]), vars

    return Layer(init=init_vars, apply=apply, name=name)
