"""Trained variables as an object of the library that the model came from."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax

from kaun import rng, tree
from kaun._calls import public, shown
from kaun.layers.core import Layer, Vars

__all__ = ["export"]


@runtime_checkable
class Exports(Protocol):
    """The functions of a layer of this package, which can put variables back into the library's object."""

    def export(self, vars: Vars) -> Any: ...


@public
def export(layer: Layer[Any, Any], vars: Vars) -> Any:
    """Return an object of the other library with the values of ``vars``, in the mode that the module was passed in.

    ========================  =====================================================================
    layer made by             result
    ========================  =====================================================================
    ``interop.flax_nnx``      a new ``nnx.Module``; the one that was passed does not change
    ``interop.linen``         the variables, ``{"params": ..., "batch_stats": ...}``
    ``interop.equinox``       the module, or ``(module, state)`` where it has an ``eqx.nn.State``
    ``interop.haiku``         the params, or ``(params, state)`` of a ``transform_with_state``
    ========================  =====================================================================

    If the layer is a part of a composition, export that part: ``export(encoder,
    vars.replace(params=vars.params["left"], state=vars.state["left"]))``.

    Args:
        layer: A layer made by one of the functions of the table.
        vars: Its variables.

    Raises:
        TypeError: If the layer is not one of these, or ``vars`` is not a ``Vars``.
        ValueError: If the variables belong to another layer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from kaun import interop
        >>> layer = interop.flax_nnx(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
        >>> trained = layer.init().replace(params={"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)})
        >>> interop.export(layer, trained)(jnp.ones((1, 2)))
        Array([[2.]], dtype=float32)
    """
    if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
        hint = "Write interop.export(model, state.vars)."
        raise TypeError(f"export expected the variables, a kaun.Vars, received {type(vars).__name__}. {hint}")
    adapter = getattr(getattr(layer, "_apply", None), "__self__", None)
    if not isinstance(adapter, Exports):
        raise TypeError(
            f"export expected a layer that interop made (flax_nnx, linen, equinox, haiku), received {shown(layer)}. "
            "If it is part of a composition, export that part with its own variables: interop.export(part, "
            'vars.replace(params=vars.params["left"], state=vars.state["left"])).'
        )
    lines = tree.difference(_shapes(layer, vars.dtype), vars)
    if lines:
        raise ValueError(
            f"export expected the variables of {layer.name}, received others:\n  " + "\n  ".join(lines[:10])
        )
    return adapter.export(vars)


def _shapes(layer: Layer[Any, Any], dtype: Any) -> Any:
    def init() -> Vars:
        with rng.scope(0):
            return layer.init(dtype=dtype)

    return jax.eval_shape(init)
