"""Checks of the arguments with which layers are made, the text that names a layer, and two helpers of their math."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun._calls import shown

__all__ = [
    "AXES", "accumulation_dtype", "along_last", "call_text", "flag", "float_dtype", "fraction", "number", "positive",
    "size", "sizes",
]  # fmt: skip

AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}
"""The axes between batch and channels, by their number."""


def size(layer: str, what: str, value: Any, least: int = 1) -> int:
    """Check an argument that is an int of at least 1, or ``least``; NumPy integers are accepted, bools are not.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is smaller.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{layer}({what}=...) expected an int of at least {least}, received {shown(value)}. "
            "Write a whole number; if it is computed, divide with //."
        ) from None
    if count < least:
        raise ValueError(f"{layer}({what}=...) expected an int of at least {least}, received {count}.")
    return count


def sizes(layer: str, what: str, value: Any, axes: int, least: int = 1) -> tuple[int, ...]:
    """Check an argument that is one size for all axes of ``AXES``, or one for each; for a single axis an int.

    Raises:
        TypeError: If it is neither an int nor as many of them.
        ValueError: If a size is smaller than ``least``.
    """
    if axes == 1 or not isinstance(value, Sequence):
        return (size(layer, what, value, least),) * axes
    each = cast("Sequence[Any]", value)
    if isinstance(value, str) or len(each) != axes:
        raise TypeError(
            f"{layer}({what}=...) expected an int or {('two', 'three')[axes - 2]} of them, ({AXES[axes]}), received "
            f"{value!r}. Write {what}=2 or {what}={(2,) * axes}."
        )
    return tuple(size(layer, what, one, least) for one in each)


def positive(layer: str, what: str, value: Any) -> float:
    """Check an argument that is a finite number above 0.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is not finite or not above 0.
    """
    found = _real(layer, what, value, "above 0")
    if not 0 < found < math.inf:
        raise ValueError(f"{layer}({what}=...) expected a finite number above 0, received {shown(found)}.")
    return found


def number(layer: str, what: str, value: Any) -> float:
    """Check an argument that is a finite number.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is not finite.
    """
    found = _real(layer, what, value, "that is finite")
    if not math.isfinite(found):
        raise ValueError(f"{layer}({what}=...) expected a finite number, received {shown(found)}.")
    return found


def fraction(layer: str, what: str, value: Any) -> float:
    """Check an argument that is a number in [0, 1).

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is outside [0, 1).
    """
    found = _real(layer, what, value, "in [0, 1)")
    if not 0 <= found < 1:
        hint = f" Write {what}={found / 100:g} for {found:g} percent." if 1 < found < 100 else ""
        raise ValueError(f"{layer}({what}=...) expected a number in [0, 1), received {shown(found)}.{hint}")
    return found


def flag(layer: str, what: str, value: Any) -> bool:
    """Check an argument that is a bool; NumPy bools are accepted, ints are not.

    Raises:
        TypeError: If it is not a bool.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{layer}({what}=...) expected True or False, received {shown(value)}. Write {what}=True or {what}=False."
        )
    return bool(value)


def float_dtype(dtype: Any) -> Any:
    """Check the dtype of a model's parameters.

    Raises:
        TypeError: If it is not a floating dtype.
        ValueError: If it is float64 and JAX runs without x64.
    """
    if dtype is None:  # NumPy takes None as float64
        raise TypeError("init(dtype=...) expected a floating dtype, received None. Use dtype=jnp.float32.")
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"init(dtype=...) expected a floating dtype, received {shown(dtype)}. Use dtype=jnp.float32."
        ) from None
    if not jnp.issubdtype(wanted, jnp.floating):
        raise TypeError(f"init(dtype=...) expected a floating dtype, received {wanted.name}. Use dtype=jnp.float32.")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"init(dtype={wanted.name}) needs JAX's x64 mode, which is off: arrays would silently become float32. "
            'Set jax.config.update("jax_enable_x64", True) before any array is made, or use dtype=jnp.float32.'
        )
    return wanted


def _real(layer: str, what: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{layer}({what}=...) expected a number {where}, received {shown(value)}. Write {what}=0.1, for example."
        )
    return float(value)


def call_text(constructor: Callable[..., Any], **arguments: Any) -> str:
    """The call that makes a layer, without arguments that equal their default: ``linear(2, 4, bias=False)``.

    Raises:
        TypeError: If an argument whose default is a bool is something else.
    """
    words: list[str] = []
    for name, p in inspect.signature(constructor).parameters.items():
        if name not in arguments:
            continue
        value, default = arguments[name], p.default
        if isinstance(default, bool):
            value = flag(constructor.__name__, name, value)
        # Arrays, which the layer refuses, have no single truth value.
        if isinstance(value, (np.ndarray, jax.Array)) or value != default:
            value = value.item() if isinstance(value, np.generic) else value
            words.append(repr(value) if default is inspect.Parameter.empty else f"{name}={value!r}")
    return f"{constructor.__name__}({', '.join(words)})"


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector with leading axes of size 1, so that it broadcasts over ``ndim`` axes without rank promotion."""
    return jax.lax.expand_dims(vector, range(ndim - 1))


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype to sum in: float32 for half precision, otherwise the dtype itself."""
    # Not jnp.promote_types, which refuses mixed dtypes under strict promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
