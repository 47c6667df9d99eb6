"""Checks of the shape and dtype of a layer's input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun.layers.path import here


def float_input(
    name: str, x: Any, dtype: Any = None, *, features: int | None = None, ndim: int | None = None, layout: str = "..."
) -> jax.Array:
    """Check the input of a layer that works on floats.

    Args:
        name: The layer, for messages.
        x: The input. NumPy arrays are canonicalized as JAX does (float64 becomes float32 without x64).
        dtype: The model's dtype (``vars.dtype``); None accepts any floating dtype.
        features: The size that the last axis must have; None accepts any.
        ndim: The number of axes; None accepts any number from 1.
        layout: The axes before the last, for messages: ``"batch, height, width"``.

    Returns:
        The input as a JAX array.

    Raises:
        TypeError: If it is not an array, or has another dtype.
        ValueError: If it has another shape.
    """
    x = _as_jax(name, x)
    last = features if features is not None else "channels"
    expected = f"{jnp.dtype(dtype).name if dtype is not None else 'float'}[{layout}, {last}]"
    received = f"received {tree.describe(x)}"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        fix = f"x.astype(jnp.{jnp.dtype(dtype).name if dtype is not None else 'float32'})"
        raise TypeError(
            f"{here(name)} expected {expected}, {received}: the layer needs floating-point input. Convert it, {fix}, "
            "or put layers.embedding(...) first if these are indices."
        )
    if dtype is not None and x.dtype != dtype:
        raise TypeError(
            f"{here(name)} expected {expected}, {received}: the parameters are {jnp.dtype(dtype).name}. Convert the "
            f"input, x.astype(jnp.{jnp.dtype(dtype).name}), or make the model with init(dtype=jnp.{x.dtype.name})."
        )
    if (ndim is not None and x.ndim != ndim) or x.ndim == 0:
        wanted = ndim or "one or more"
        fix = _missing_axis(x, features) if ndim is not None and x.ndim == ndim - 1 else ""
        raise ValueError(
            f"{here(name)} expected {expected}, {received}: it has {x.ndim} axes instead of {wanted}.{fix}"
        )
    if features is not None and x.shape[-1] != features:
        raise ValueError(
            f"{here(name)} expected {expected}, {received}: the last axis has size {x.shape[-1]}, not {features}. "
            f"{_other_features(x, features, ndim)}"
        )
    return x


def _missing_axis(x: jax.Array, features: int | None) -> str:
    """What to write for an input with one axis too few."""
    one, image = "For one example write x[None]", "for a single channel without an axis x[..., None]"
    if features is None or features == 1 == x.shape[-1]:
        return f" {one}, {image}."
    return f" {one}." if features == x.shape[-1] else f" {image[0].upper()}{image[1:].replace('x[', 'write x[')}."


def _other_features(x: jax.Array, features: int, ndim: int | None) -> str:
    """What to write for an input whose last axis has another size than ``features``."""
    if ndim is not None and ndim > 2 and x.shape[1] == features:
        order = ", ".join(map(str, (0, *range(2, ndim), 1)))
        return f"Axis 1 has size {features}: if these are the channels, put them last, x.transpose({order})."
    size = x.shape[-1]
    return f"Make the layer with {size} input features, or the layer before it with {features} output features."


def int_input(name: str, x: Any, *, layout: str = "...") -> jax.Array:
    """Check the input of a layer that works on indices, and return it as a JAX array.

    Raises:
        TypeError: If it is not an array, or its dtype is not an integer dtype.
    """
    x = _as_jax(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"{here(name)} expected int[{layout}], received {tree.describe(x)}: the layer needs integer indices. "
            "Convert the input, x.astype(jnp.int32)."
        )
    return x


def _as_jax(name: str, x: Any) -> jax.Array:
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, (np.ndarray, np.generic, float, int)):
        return jnp.asarray(x)
    raise TypeError(
        f"{here(name)} expected an array, received {type(x).__name__}. Pass a NumPy or JAX array, or write a layer "
        "that takes a tree: Layer(init=..., apply=...)."
    )
