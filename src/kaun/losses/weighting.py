"""Which elements count in a mean, and by how much: the arguments ``weights`` and ``where`` of every loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun.losses.checks import ALL, as_array, equal_but_ones, known, not_negative, trailing
from kaun.losses.mean import Mean, wide

__all__ = ["Weighting", "weighting"]

Host = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Weighting:
    """Which elements count in a mean, and by how much.

    Attributes:
        name: The name of the loss, for messages.
        dtype: The dtype of the sums: that of the outputs, or float32 for half precision.
        shape: The shape of the losses of the elements.
        mask: Bool, which of them count, with as many axes as ``shape`` has. None if all do.
        weights: In ``dtype``, with as many axes. None if all are 1.
        seen: As far as it is known on the host, which elements count.
        complete: Whether that is all of it.
    """

    name: str
    dtype: Any
    shape: tuple[int, ...]
    mask: jax.Array | None
    weights: jax.Array | None
    seen: Host
    complete: bool

    def without(self, out: jax.Array, host: Host | None) -> Weighting:
        """Leave out elements.

        Args:
            out: Bool, which to leave out, with as many axes as ``shape`` has.
            host: The same on the host; None if it is not known.

        Raises:
            ValueError: If none is left, as far as is known.
        """
        mask = ~out if self.mask is None else self.mask & ~out
        if host is None:
            return dataclasses.replace(self, mask=mask, complete=False)
        seen = self.seen & ~host
        if not seen.any():
            raise self._nothing()
        return dataclasses.replace(self, mask=mask, seen=seen)

    def kept(self, ndim: int) -> Host | None:
        """Which elements count, on the host, for values with that many axes; None if it is not known."""
        return trailing(self.seen, ndim) if self.complete else None

    def safe(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """An array with another number in place of everything that does not count.

        What is computed of infinite numbers or NaN would be NaN in the gradient, even if it were not used.
        """
        return x if self.mask is None else jnp.where(trailing(self.mask, x.ndim), x, fill)

    def mean(self, elements: jax.Array, share: jax.Array | None = None) -> Mean:
        """The weighted mean of the losses of the elements.

        Args:
            elements: The losses.
            share: What an element of weight 1 adds to the weight of the mean. Default: 1.

        Raises:
            ValueError: If all shares are known to be 0.
        """
        elements = elements.astype(self.dtype)
        if self.mask is None and self.weights is None and share is None:
            return Mean(elements.sum(), jnp.dtype(self.dtype).type(elements.size))
        weights = jnp.ones((1,) * len(self.shape), self.dtype) if self.weights is None else self.weights
        if self.mask is not None:
            elements, weights = jnp.where(self.mask, elements, 0), jnp.where(self.mask, weights, 0)
        total = (elements if self.weights is None else elements * weights).sum()
        if share is not None:
            host = known(share)
            if host is not None and not (host.astype(bool) & self.seen).any():
                raise self._nothing()
            weights = weights * share.astype(self.dtype)
        return Mean(total, jnp.broadcast_to(weights, self.shape).sum())

    def _nothing(self) -> ValueError:
        return ValueError(
            f"{self.name} expected at least one element that counts, but its masks and weights leave out all "
            f"{math.prod(self.shape)}: there is nothing to average. Skip such batches."
        )


def weighting(name: str, outputs: jax.Array, shape: tuple[int, ...], weights: Any, where: Any) -> Weighting:
    """Check the arguments ``weights`` and ``where`` of a loss.

    Args:
        name: The name of the loss.
        outputs: The model's outputs, for their dtype.
        shape: The shape of the losses of the elements.
        weights: Real numbers of that shape or of its leading axes, or None. An element of weight 0 is left out.
        where: A bool mask of that shape or of its leading axes, or None.

    Raises:
        TypeError: If ``weights`` are not real, or ``where`` is not bool.
        ValueError: If a shape is another one, or, as far as the values are known, a weight is negative or not finite,
            or no element counts.
    """
    found = Weighting(name, wide(outputs.dtype), shape, None, None, ALL, True)
    if where is not None:
        mask = _of_elements(name, "where", where, shape)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"{name} expected where as a bool mask, True for what counts, received {tree.describe(mask)}. Write "
                "where=mask > 0, or weights= for numbers."
            )
        host = known(where)
        found = found.without(~trailing(mask, len(shape)), None if host is None else ~trailing(host, len(shape)))
    if weights is not None:
        given = _of_elements(name, "weights", weights, shape)
        if not tree.is_real(given):
            raise TypeError(f"{name} expected real weights, received {tree.describe(given)}. Write weights.real.")
        host = known(weights)
        if host is not None:
            kept = found.kept(len(shape))
            rows: Any = None if kept is None else kept.any(axis=tuple(range(host.ndim, kept.ndim)))
            not_negative(name, "weights", host, "Write where= to leave elements out", rows)
            host = trailing(host, len(shape)) == 0
        numbers = trailing(given.astype(found.dtype), len(shape))
        found = found.without(numbers == 0, host)
        return dataclasses.replace(found, weights=jnp.where(numbers >= 0, numbers, jnp.nan))
    return found


def _of_elements(name: str, argument: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    array = as_array(name, argument, value)
    if array.shape == shape or (array.ndim and array.shape == shape[: array.ndim]):
        return array
    if equal_but_ones(array.shape, shape):
        fix = f"Write {argument}.reshape({list(shape)})"
    else:
        fix = f"Make {argument}.shape equal {list(shape)} or {list(shape[:1])}" if shape else "Pass a scalar array"
    raise ValueError(
        f"{name} has losses of shape {list(shape)} and expected {argument} of that shape or of its leading axes, "
        f"received {argument} {tree.describe(array)}: it is not broadcast otherwise. {fix}."
    )
