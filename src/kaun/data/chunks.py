"""Several consecutive items of a pipeline as one: the same item many times, or rows that are gathered together."""

from __future__ import annotations

import functools
import itertools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = [
    "Chunk",
    "Chunks",
    "Limit",
    "RowGather",
    "batch_index",
    "chain_chunks",
    "gather_rows",
    "is_explicit",
    "item_chunks",
    "map_chunks",
    "one_by_one",
    "pass_chunks",
    "read_rows",
    "row_chunks",
    "rows_are_spread",
    "rows_reader",
    "skip_chunks",
    "take_chunks",
]  # fmt: skip

Limit = Callable[[int], int]
"""``limit(left)``: how many items the next chunk may hold, of those that are left; asked again for each chunk."""

Chunks = Callable[["int | None", int, Limit], "Iterator[Chunk]"]
"""``chunks(epoch, start, limit)``: the items of one pass, from ``start`` on; the pass is as ``nodes.Node`` says."""

_SAME: Mapping[int, RowGather] = types.MappingProxyType({})


class Chunk(NamedTuple):
    """Consecutive items that differ, if at all, in the contents of some arrays.

    Attributes:
        item: The first of them, but for the contents of the arrays in ``rows``, which may be those of another one.
        n: How many they are.
        rows: For each array of the item that differs in some of them, by its id, the rows of all of them.
    """

    item: Any
    n: int
    rows: Mapping[int, RowGather]


class RowGather:
    """The rows of an array that make up the batches of a chunk.

    Args:
        array: A NumPy or JAX array.
        index: Which rows of the array, those of one batch after those of the other: an index array or a slice. Where a
            slice is beyond the end of the array, its last row fills the batch.
        size: Rows of a batch.
    """

    def __init__(self, array: Any, index: Any, size: int) -> None:
        self._array, self._index, self._size = array, index, size

    def into(self, out: np.ndarray[Any, Any], start: int) -> None:
        """Write the batches from number ``start`` on into ``out``, an array [count, size, ...]."""
        flat = out.reshape(len(out) * out.shape[1], *out.shape[2:])  # -1 has no value where a row has no columns
        index = self._at(start, len(out))
        if isinstance(index, slice):
            rows = self._array[index]
            flat[: len(rows)] = rows
            flat[len(rows) :] = self._array[-1]
        elif flat.dtype == self._array.dtype:
            np.take(self._array, index, axis=0, out=flat, mode="clip")  # the other modes go through a buffer
        else:
            with np.errstate(over="ignore"):  # float64 beyond float32 is inf, as jnp.asarray makes it
                flat[...] = self._array[index]

    def on_device(self, start: int, count: int, capacity: int) -> jax.Array:
        """The ``count`` batches from number ``start`` on of a JAX array, filled up to [capacity, size, ...]."""
        index = self._at(start, count)
        if isinstance(index, slice):
            index = np.minimum(np.arange(index.start, index.stop), len(self._array) - 1)
        rows = np.resize(index, capacity * self._size)  # one program, whatever the count
        if rows_are_spread(self._array):
            return _gather_spread(self._array, rows.reshape(capacity, self._size))
        return gather_rows(self._array, rows).reshape(capacity, self._size, *self._array.shape[1:])

    def _at(self, start: int, count: int) -> Any:
        first, last = start * self._size, (start + count) * self._size
        if isinstance(self._index, slice):
            return slice(self._index.start + first, self._index.start + last)
        return self._index[first:last]


gather_rows: Callable[[jax.Array, Any], jax.Array] = jax.jit(
    lambda array, index: array.at[index].get(mode="promise_in_bounds", out_sharding=_where_rows_lie(array, len(index)))
)
"""The rows of a JAX array at an index array, which must be in its bounds."""


def _where_rows_lie(array: jax.Array, n: int) -> NamedSharding | None:
    """Where to put ``n`` rows of an array on a mesh of explicit axes, for which JAX does not choose; None elsewhere."""
    if not is_explicit(array):
        return None
    return _of_rows(jax.typeof(array).sharding, (n,))


def _of_rows(sharding: Any, shape: tuple[int, ...]) -> NamedSharding:
    """Where to put rows of an array that lies as ``sharding`` says: as there, unless the devices do not divide them.

    Args:
        sharding: The placement of the array.
        shape: The shape of the index of the rows. Its last axis is that of the rows of a batch.
    """
    rows, *rest = sharding.spec
    names = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
    divides = shape[-1] % math.prod(sharding.mesh.shape[name] for name in names) == 0
    spec = [*[None] * (len(shape) - 1), rows if divides else None, *rest]
    while spec and spec[-1] is None:  # equal placements of unequal specs would compile a program again
        spec.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def is_explicit(array: Any) -> bool:
    """Whether an array lies on a mesh of explicit axes."""
    return isinstance(array, jax.Array) and AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def rows_are_spread(array: Any) -> bool:
    """Whether axis 0 of an array lies over devices of a mesh of automatic axes."""
    spec = getattr(getattr(array, "sharding", None), "spec", None)
    return bool(spec) and spec[0] is not None and not is_explicit(array)


def rows_reader(array: jax.Array) -> Callable[[Any], jax.Array]:
    """The function from an index array to rows of a JAX array, which lie over the devices as the array does."""
    # The compiler would put the rows of an array that is spread everywhere.
    return functools.partial(_gather_spread if rows_are_spread(array) else gather_rows, array)


def _gather_spread(array: jax.Array, index: Any) -> jax.Array:
    return _gather_to(array, index, _of_rows(array.sharding, np.shape(index)))


_gather_to: Callable[[jax.Array, Any, NamedSharding], jax.Array] = jax.jit(
    lambda array, index, where: jax.lax.with_sharding_constraint(array.at[index].get(mode="promise_in_bounds"), where),
    static_argnums=2,
)


def read_rows(reader: Callable[[Any], jax.Array], index: Any) -> jax.Array:
    """The rows of a ``rows_reader``. Always by an index array: a slice would compile once for each batch."""
    return reader(np.arange(index.start, index.stop) if isinstance(index, slice) else index)


def item_chunks(item: Any, n: int) -> Chunks:
    """The same item ``n`` times."""

    def chunks(epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        chunk = Chunk(item, 1, _SAME)
        while start < n:
            count = limit(n - start)
            if count != chunk.n:
                chunk = Chunk(item, count, _SAME)
            yield chunk
            start += count

    return chunks


def batch_index(order: Any, i: int, size: int, n: int) -> Any:
    """The index of batch ``i`` of ``n`` rows, in an order or, where it is None, the rows' own."""
    rows = slice(i * size, min(i * size + size, n))
    return rows if order is None else order[rows]


def row_chunks(
    arrays: Sequence[Any],
    take: Callable[[Any], Any],
    order: Callable[[int | None], Any],
    size: int,
    n: int,
    length: int,
) -> Chunks:
    """The batches of arrays in memory.

    Args:
        arrays: The leaves of the tree whose rows ``take`` gives.
        take: The tree of the rows at an index.
        order: The order of the rows in a pass, None for their own.
        size: Rows of a batch; a last one that is smaller comes alone.
        n: Rows of a pass.
        length: Batches of a pass.
    """
    # Rows are found again by the identity of the item's arrays, and those on explicit axes are replaced by fit.
    alone = any(is_explicit(array) for array in arrays)
    on_host = all(isinstance(array, np.ndarray) for array in arrays)

    def chunks(epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        rows, item = order(epoch), None
        while start < length:
            count = 1 if alone else limit(max(1, n // size - start))
            # One item stands for all: a gather into new memory and a copy from there take three times as long as one
            # into the memory of the block.
            stands = on_host and rows is not None and (start + 1) * size <= n
            item = item if item is not None and stands else take(batch_index(rows, start, size, n))
            sources: dict[int, RowGather] = {}
            if count > 1 or stands:
                index = slice(start * size, n) if rows is None else rows[start * size :]
                leaves = zip(jax.tree_util.tree_leaves(item), arrays, strict=True)
                sources = {id(a): RowGather(whole, index, size) for a, whole in leaves}
            yield Chunk(item, count, sources)
            start += count

    return chunks


def one_by_one(items: Iterator[Any]) -> Iterator[Chunk]:
    """Each item as a chunk. An iterator in C: ``fit`` pulls one for each step."""
    return map(Chunk, items, itertools.repeat(1), itertools.repeat(_SAME))


def map_chunks(chunks: Chunks | None, call: Callable[[int, Any], Any]) -> Chunks | None:
    """The items ``call(i, item)``, for a ``call`` that passes on the arrays of the item as they are."""
    if chunks is None:
        return None

    def mapped(epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        for chunk in chunks(epoch, start, limit):
            yield chunk._replace(item=call(start, chunk.item))
            start += chunk.n

    return mapped


def chain_chunks(chunks: Chunks | None, n: int, length: int | None) -> Chunks | None:
    """The items of ``n`` passes of ``length`` items, one after the other."""
    if chunks is None or not length:
        return None

    def chained(epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        first, within = divmod(start, length)
        for e in range(first, n):
            yield from chunks((epoch or 0) * n + e, within if e == first else 0, limit)

    return chained


def pass_chunks(chunks: Chunks | None, e: int) -> Chunks | None:
    """The items of pass ``e``, in every pass."""
    return None if chunks is None else lambda epoch, start, limit: chunks(e, start, limit)


def skip_chunks(chunks: Chunks | None, n: int) -> Chunks | None:
    """The items after the first ``n``."""
    return None if chunks is None else lambda epoch, start, limit: chunks(epoch, start + n, limit)


def take_chunks(chunks: Chunks | None, n: int) -> Chunks | None:
    """The first ``n`` items."""
    if chunks is None:
        return None

    def taken(epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        if start >= n:
            return
        left = [n - start]
        for chunk in chunks(epoch, start, lambda more: limit(min(more, left[0]))):
            left[0] -= chunk.n
            yield chunk
            if not left[0]:
                return

    return taken
