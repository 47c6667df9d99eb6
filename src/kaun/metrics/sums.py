"""Sums that are exact on the host, of values that the device may still be working on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree

__all__ = ["AHEAD", "DelayedReader", "ExactMean", "is_real_scalar"]

# How many results may wait on the device. In an evaluation each holds its batch until it is computed, so few.
AHEAD = 16


class DelayedReader:
    """Hands values on in order and some later, to be read from the device while that has newer work.

    Arguments:
        window: how many values may wait.
        take: called with a list of them; it reads them.
    """

    __slots__ = ("_pending", "_take", "_window")

    def __init__(self, window: int, take: Callable[[list[Any]], None]) -> None:
        self._window, self._take = window, take
        self._pending: list[Any] = []

    def push(self, value: Any) -> None:
        self._pending.append(value)
        if len(self._pending) >= self._window:
            # The older half: while this waits for it, the device has the newer half to work on.
            self._hand_on(self._window // 2)

    def flush(self) -> None:
        """Hand on what is left."""
        if self._pending:
            self._hand_on(len(self._pending))

    def _hand_on(self, n: int) -> None:
        self._take(self._pending[:n])
        del self._pending[:n]


class ExactMean:
    """Sums of values and of counts, exact on the host; the newest are still on the device."""

    __slots__ = ("_counts", "_lagging", "_sums", "added")

    def __init__(self, window: int) -> None:
        self.added: int = 0
        self._lagging = DelayedReader(window, lambda pairs: self.take(jax.device_get(pairs)))
        self._sums: list[float] = []
        self._counts: list[float] = []

    def add(self, value: Any, count: Any) -> None:
        """Add a value and its count, which may still be on the device."""
        self.added += 1
        self._lagging.push((value, count))

    def take(self, pairs: list[tuple[Any, Any]]) -> None:
        """Add pairs that are on the host."""
        self._sums = _exact([*self._sums, *(float(value) for value, _ in pairs)])
        self._counts = _exact([*self._counts, *(float(count) for _, count in pairs)])

    def mean(self, name: str) -> float:
        self._lagging.flush()
        if not (count := sum(self._counts)):
            raise ValueError(f"The counts{f' of {name!r}' if name else ''} add up to 0: there is nothing to average.")
        return sum(self._sums) / count


def _exact(values: list[float]) -> list[float]:
    """The exact sum as a few floats: the rounded sum, what the rounding left, and so on."""
    parts: list[float] = []
    try:
        while rest := math.fsum([*values, *(-part for part in parts)]):
            if not math.isfinite(rest):
                return [rest]
            parts.append(rest)
    except (OverflowError, ValueError):  # beyond the largest float, or inf - inf
        return [sum(values)]
    return parts


def is_real_scalar(value: Any) -> bool:
    """Whether a value is a real number, or an array of shape () that holds one (a traced one too)."""
    if tree.is_array(value):
        return value.shape == () and any(jnp.issubdtype(value.dtype, k) for k in (jnp.floating, jnp.integer, jnp.bool_))
    return isinstance(value, (bool, int, float))
