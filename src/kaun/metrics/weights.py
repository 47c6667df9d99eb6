"""Weights of rows or elements: checked, and brought to the shape of what they weigh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._jax import is_traced
from kaun.losses.checks import as_array, known, not_negative, trailing

__all__ = ["Weights", "blank", "check_weights", "nothing_to_average", "own_values"]


class Weights(NamedTuple):
    """The weight of each element.

    Attributes:
        values: The weights, in the shape of the elements; None where each element counts once or not at all.
        counted: Which elements have another weight than 0; True for all.
        valid: Which weights are finite and not negative; True for all.
    """

    values: Any
    counted: Any
    valid: Any

    @property
    def columns(self) -> tuple[Any, ...]:
        """The weights as one array, in a tuple; empty where each element counts once."""
        if self.values is not None:
            return (self.values,)
        return () if self.counted is True else (self.counted,)


def check_weights(where: str, weights: Any, shape: tuple[int, ...]) -> Weights:
    """The weights of elements of a shape, given for each of them or for each of their rows.

    Raises:
        TypeError: If they are not an array of real numbers.
        ValueError: If their shape is not that of the elements or of their leading axes, or if a weight (of known
            value) is negative or not finite.
    """
    if weights is None:
        return Weights(None, True, True)
    array = as_array(where, "weights", weights)
    if not tree.is_real(array):
        raise TypeError(f"{where} expected weights that are real numbers, received {tree.describe(array)}.")
    if array.shape != shape[: array.ndim] or (shape and not array.ndim):
        rows = f" or one for each row [{shape[0]}]" if len(shape) > 1 else ""
        raise ValueError(
            f"{where} expected a weight for each element {list(shape)}{rows}, received weights "
            f"{tree.describe(array)}. Weights are broadcast along the last axes only."
        )
    if array.dtype == jnp.bool_:
        return Weights(None, _spread(array, shape), True)
    valid, host = jnp.isfinite(array) & (array >= 0), known(weights)
    if host is None:
        return Weights(_spread(array, shape), _spread(array != 0, shape), _spread(valid, shape))
    not_negative(where, "weights", host, "Give rows that do not count the weight 0")
    return Weights(_spread(own_values(weights, array), shape), _spread(array != 0, shape), True)


def own_values(given: Any, array: Any) -> Any:
    """A copy of a NumPy array that was given, or else the JAX array of it: on the host float64 stays float64."""
    return tree.snapshot(given) if isinstance(given, (np.ndarray, np.generic)) else array


def blank(value: Any, counted: Any) -> Any:
    """The value with zeros where the elements do not count, so that what they hold does not matter."""
    if counted is True:
        return value
    xp: Any = np if isinstance(value, (np.ndarray, np.generic)) and not is_traced(counted) else jnp
    return xp.where(trailing(xp.asarray(counted), value.ndim), value, xp.zeros((), value.dtype))


def nothing_to_average() -> ValueError:
    """The error for weights that are all 0."""
    return ValueError(
        "The weights add up to 0: there is nothing to average. Give at least one row a weight above 0, or leave the "
        "data out."
    )


def _spread(a: Any, shape: tuple[int, ...]) -> Any:
    xp: Any = np if isinstance(a, (np.ndarray, np.generic)) else jnp
    return xp.broadcast_to(trailing(a, len(shape)), shape)
