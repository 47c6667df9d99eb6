"""Types of the arguments of ``Data``, for the type checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["LossOfLabels", "Unknown"]


class Unknown:
    """A type that no value has: an overload with it is chosen only for ``Any``."""


class _TakesWhere(Protocol):
    def __call__(self, output: Any, labels: Any, /, *, where: Any) -> Any: ...


class _TakesWeights(Protocol):
    def __call__(self, output: Any, labels: Any, /, *, weights: Any) -> Any: ...


class _TakesBoth(Protocol):
    def __call__(self, output: Any, labels: Any, /, *, where: Any, weights: Any) -> Any: ...


LossOfLabels = Callable[[Any, Any], Any] | _TakesWhere | _TakesWeights | _TakesBoth
"""A loss of output and labels. It takes ``where=`` if rows are filled, and ``weights=`` if they have weights."""
