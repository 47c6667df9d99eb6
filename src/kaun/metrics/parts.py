"""The counts of a metric, which add up over batches.

On the host counts are int64 and float64. What float32 cannot add up exactly (weights, errors) leaves the device as
``RowValues``, the values of each row, and is summed on the host.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from kaun._jax import any_traced

__all__ = ["RowValues", "adds_exactly", "as_floats", "merge", "on_host", "outline", "settle"]


@runtime_checkable
class Mergeable(Protocol):
    """A node in a tree of counts that has another way to merge than addition leaf by leaf."""

    def merged(self, other: Any) -> Any:
        """The counts of the rows of both."""
        ...


@jax.tree_util.register_pytree_node_class
class RowValues:
    """Values of each row of a batch, from which the host computes counts, or which it keeps.

    Attributes:
        columns: Arrays of one length along axis 0.
        count: ``count(xp, *columns, *settings)`` returns counts that add up; xp is NumPy, with columns in int64 and
            float64, or in compiled code ``jax.numpy``. None keeps the rows of all batches, in their dtypes.
        settings: Hashable values.
    """

    __slots__ = ("columns", "count", "settings")
    columns: tuple[Any, ...]
    count: Callable[..., Any] | None
    settings: tuple[Any, ...]

    def __init__(self, columns: tuple[Any, ...], count: Callable[..., Any] | None, settings: tuple[Any, ...] = ()):
        self.columns, self.count, self.settings = columns, count, settings

    def counted(self, xp: Any) -> Any:
        """The counts of the rows, or the rows themselves where they are kept."""
        return self if self.count is None else self.count(xp, *self.columns, *self.settings)

    def merged(self, other: RowValues) -> RowValues:
        """The rows of both, one after another."""
        xp: Any = jnp if any_traced([*self.columns, *other.columns]) else np
        pairs = zip(self.columns, other.columns, strict=True)
        return RowValues(tuple(xp.concatenate(pair) for pair in pairs), self.count, self.settings)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Called by JAX: the children, and the rest."""
        return self.columns, (self.count, self.settings)

    @classmethod
    def tree_unflatten(cls, rest: Any, columns: tuple[Any, ...]) -> RowValues:
        """Called by JAX: the pytree made again."""
        return cls(columns, *rest)


def merge(a: Any, b: Any) -> Any:
    """The counts of two groups of rows together."""

    def both(x: Any, y: Any) -> Any:
        return x.merged(y) if isinstance(x, Mergeable) else operator.add(x, y)

    return jax.tree_util.tree_map(both, a, b, is_leaf=lambda node: isinstance(node, Mergeable))


def on_host(counts: Any, batches: bool = False) -> Any:
    """Counts with NumPy arrays: int64 for integers and bools, float64 for floats; rows counted or kept.

    Args:
        counts: Counts of concrete values.
        batches: Whether they are those of several batches, stacked along axis 0, which are added up.
    """

    def convert(node: Any) -> Any:
        if not isinstance(node, RowValues):
            return np.asarray(node).sum(axis=0, dtype=_wide_dtype(node)) if batches else _wide(node)
        columns: tuple[Any, ...] = tuple(map(np.asarray, node.columns))
        if batches:
            columns = tuple(c.reshape(-1, *c.shape[2:]) for c in columns)
        columns = columns if node.count is None else tuple(map(_wide, columns))
        return RowValues(columns, node.count, node.settings).counted(np)

    return jax.tree_util.tree_map(convert, counts, is_leaf=_is_rows)


def adds_exactly(counts: Any) -> bool:
    """Whether sums of these counts do not depend on the order of addition, as those of integers and of kept rows."""

    def exact(node: Any) -> bool:
        if isinstance(node, RowValues):
            return node.count is None
        return not isinstance(node, Mergeable) and _wide_dtype(node) is np.int64

    return all(map(exact, jax.tree_util.tree_leaves(counts, is_leaf=lambda node: isinstance(node, Mergeable))))


def settle(counts: Any) -> tuple[Any, Any]:
    """The counts without rows that are not counted yet, and the namespace to compute with: NumPy, or JAX if traced."""
    if not any_traced(jax.tree_util.tree_leaves(counts)):
        return on_host(counts), np
    convert = lambda node: node.counted(jnp) if isinstance(node, RowValues) else node
    return jax.tree_util.tree_map(convert, counts, is_leaf=_is_rows), jnp


def as_floats(xp: Any, values: Any) -> Any:
    """Values in float64 on the host, and in compiled code in float32 or, where they are it, in float64."""
    return values.astype(np.float64 if xp is np or values.dtype == np.float64 else np.float32)


def outline(counts: Any) -> Any:
    """The counts without the lengths of kept rows, to compare shapes."""
    convert = lambda node: [c[:0] for c in node.columns] if isinstance(node, RowValues) else node
    return jax.tree_util.tree_map(convert, counts, is_leaf=_is_rows)


def _is_rows(node: Any) -> bool:
    return isinstance(node, RowValues)


def _wide(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values).astype(_wide_dtype(values))


def _wide_dtype(values: Any) -> Any:
    return np.float64 if jnp.issubdtype(np.asarray(values).dtype, jnp.floating) else np.int64
