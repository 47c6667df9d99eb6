"""NumberLayout: the places of a step's numbers in its results: scalars in tables, counts of metrics in vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun._engine.packing import Packing
from kaun._loss import Weighted
from kaun.metrics import CountedParts

__all__ = ["NumberLayout", "unwritten"]

_LOSS_WEIGHT = "loss_weight"
_CONSTANT = 1 << 12  # elements


class NumberLayout:
    """The places of a step's numbers: scalars are columns of a table for each dtype, counts a vector for each dtype.

    A step of an ensemble has arrays [members] as its scalars.

    Args:
        numbers: The numbers of a step, or their shapes and dtypes, as ``StepOutput`` has them.

    Attributes:
        places: For each scalar by name the index of its table and its column.
        weights: For the loss and each scalar that it returned, by name, the place of its weight; None where it counts
            by the number of examples.
        results: How many arrays the numbers are.
        bytes: How many bytes the counts of a step have.
    """

    __slots__ = ("_packing", "_shape", "_structure", "_tables", "bytes", "places", "results", "weights")

    def __init__(self, numbers: Mapping[str, Any]) -> None:
        scalars = _scalars(numbers)
        self._shape: tuple[int, ...] = next((scalar.shape for scalar in scalars.values()), ())
        # For each dtype the keys of its scalars, in the order of their columns.
        self._tables: dict[Any, list[Any]] = {}
        for key, scalar in scalars.items():
            self._tables.setdefault(scalar.dtype, []).append(key)
        table_of = {dtype: i for i, dtype in enumerate(self._tables)}
        places = {
            key: (table_of[scalar.dtype], self._tables[scalar.dtype].index(key)) for key, scalar in scalars.items()
        }
        self.weights = {"loss": places.pop(_LOSS_WEIGHT, None)}
        self.weights |= {name: places.pop((name,), None) for name, v in numbers.items() if isinstance(v, Weighted)}
        self.places: dict[str, tuple[int, int]] = places
        leaves, self._structure = jax.tree_util.tree_flatten(_counts(numbers))
        self._packing = Packing([(leaf.shape, leaf.dtype) for leaf in leaves])
        self.results = len(scalars) + len(leaves)
        self.bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for the results of steps that can be concatenated."""
        return self.places, self.weights, self._packing, self._structure

    def rows(self, numbers: Mapping[str, Any]) -> list[jax.Array]:
        """Return the numbers of a step as a row of each table, and the vectors."""
        scalars = _scalars(numbers)
        rows = [jnp.stack([scalars[key] for key in keys]) for keys in self._tables.values()]
        leaves = jax.tree_util.tree_leaves(_counts(numbers))
        return rows + self._packing.pack(leaves) if leaves else rows

    def empty(self, length: int) -> list[jax.Array]:
        """Return tables and vectors for the numbers of ``length`` steps, to be written."""
        tables = [unwritten((length, len(keys), *self._shape), dtype) for dtype, keys in self._tables.items()]
        sizes: dict[Any, int] = {}
        for dtype, shape, _ in self._packing.layout:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return tables + [unwritten((length, size), dtype) for dtype, size in sizes.items()]

    def columns(self, results: Sequence[Any], steps: int) -> dict[str, np.ndarray[Any, Any]]:
        """Wait for the steps, and return the scalars of the first ``steps`` of them by name."""
        tables = [np.asarray(table)[:steps] for table in results[: len(self._tables)]]
        return {name: tables[table][:, column] for name, (table, column) in self.places.items()}

    def weighted(self, results: Sequence[Any], steps: int) -> dict[str, np.ndarray[Any, Any] | None]:
        """Wait for the steps, and return the weights of the first ``steps`` of them in float64, by name."""
        read = lambda at: None if at is None else np.asarray(results[at[0]])[:steps, at[1]].astype(np.float64)
        return {name: read(at) for name, at in self.weights.items()}

    def parts(self, results: Sequence[Any], steps: int) -> dict[str, CountedParts]:
        """Wait for the steps, and return the parts of the first ``steps`` of them by name, stacked along axis 0."""
        vectors = [np.asarray(vector)[:steps] for vector in results[len(self._tables) :]]
        held = {vector.dtype: vector for vector in vectors}
        leaves = [
            held[dtype][:, start : start + math.prod(shape)].reshape(steps, *shape)
            for dtype, shape, start in self._packing.layout
        ]
        return jax.tree_util.tree_unflatten(self._structure, leaves)


def unwritten(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return an array that a loop fills before it is read.

    Zeros would be a kernel, which XLA:CPU compiles in some 10 ms. A constant is copied, unless all of it is one value.
    Under ``jax.set_mesh`` it would have no mesh.
    """
    size = math.prod(shape)
    if not 1 < size <= _CONSTANT or not jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(shape, dtype)
    return jnp.asarray((np.arange(size) == 0).astype(dtype).reshape(shape))


def _scalars(numbers: Mapping[str, Any]) -> dict[Any, Any]:
    """The scalars by name, and the weights of those that have one by a tuple with the name."""
    found: dict[Any, Any] = {}
    for name, number in numbers.items():
        if isinstance(number, Weighted):
            found[name] = number.value
            found |= {} if number.weight is None else {(name,): number.weight}
        elif not isinstance(number, CountedParts):
            found[name] = number
    return found


def _counts(numbers: Mapping[str, Any]) -> dict[str, CountedParts]:
    return {name: number for name, number in numbers.items() if isinstance(number, CountedParts)}
