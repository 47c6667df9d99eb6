"""Several consecutive items of a pipeline as one: the same item again and again, or rows that are gathered together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun.data import convert

__all__ = [
    "Chunk",
    "Chunks",
    "Limit",
    "RowGather",
    "chained",
    "mapped",
    "of_batch",
    "of_item",
    "of_rows",
    "one_by_one",
    "open_items",
    "read_rows",
    "skipped",
    "taken",
    "within",
]  # fmt: skip

Limit = Callable[[int], int]
"""``most(left)``: how many items the next run may stand for, of those that are left; asked anew for each."""

Chunks = Callable[[int, int, Limit], "Iterator[Chunk]"]
"""``runs(epoch, start, most)``: the items of one pass from ``start`` on."""


class Chunk(NamedTuple):
    """Consecutive items that differ, if at all, in the contents of some arrays.

    item: the first of them.
    n: how many they are.
    rows: for each array of the first item that differs in the others, by its id, where all of them come from.
    """

    item: Any
    n: int
    rows: Mapping[int, RowGather]


class RowGather:
    """The rows of an array that make up the batches of a run.

    Arguments:
        array: a NumPy or JAX array.
        index: for each row of the batches, one after the other, which row of the array; or a slice of the array.
        size: rows of a batch.
    """

    def __init__(self, array: Any, index: Any, size: int) -> None:
        self._array, self._index, self._size = array, index, size

    def into(self, out: np.ndarray[Any, Any], start: int) -> None:
        """Write batches, from number ``start`` on, into ``out`` [count, size, ...]."""
        flat = out.reshape(-1, *out.shape[2:])
        index = self._at(start, len(out))
        if isinstance(index, slice):
            flat[...] = self._array[index]
        elif flat.dtype == self._array.dtype:
            np.take(self._array, index, axis=0, out=flat, mode="clip")  # the other modes go through a buffer
        else:
            with np.errstate(over="ignore"):  # float64 beyond float32 is inf, as jnp.asarray makes it
                flat[...] = self._array[index]

    def on_device(self, start: int, count: int, capacity: int) -> jax.Array:
        """Batches [capacity, size, ...] of a JAX array, from number ``start`` on; only ``count`` of them count."""
        index = self._at(start, count)
        index = np.arange(index.start, index.stop) if isinstance(index, slice) else index
        rows = np.resize(index, capacity * self._size)  # one program, whatever the count
        return read_rows(self._array, rows).reshape(capacity, self._size, *self._array.shape[1:])

    def _at(self, start: int, count: int) -> Any:
        first, last = start * self._size, (start + count) * self._size
        if isinstance(self._index, slice):
            return slice(self._index.start + first, self._index.start + last)
        return self._index[first:last]


def read_rows(array: jax.Array, index: Any) -> jax.Array:
    """The rows of a JAX array. Always by index array: slices would compile anew for each batch."""
    return _gather(array, np.arange(index.start, index.stop) if isinstance(index, slice) else index)


_gather = jax.jit(lambda array, index: array.at[index].get(mode="promise_in_bounds"))


def of_item(item: Any, n: int) -> Chunks:
    """The very same item ``n`` times."""

    def runs(epoch: int, start: int, most: Limit) -> Iterator[Chunk]:
        while start < n:
            count = most(n - start)
            yield Chunk(item, count, {})
            start += count

    return runs


def of_batch(order: Any, i: int, size: int, n: int) -> Any:
    """The index of batch ``i`` of ``n`` rows, in an order or, where it is None, the rows' own."""
    rows = slice(i * size, min(i * size + size, n))
    return rows if order is None else order[rows]


def of_rows(
    arrays: Sequence[Any], take: Callable[[Any], Any], order: Callable[[int], Any], size: int, length: int
) -> Chunks:
    """The batches of arrays in memory.

    Arguments:
        arrays: the leaves of the tree whose rows ``take`` gives.
        order: of the rows in a pass; None for their own.
        size: rows of a batch; a last one that is smaller comes alone.
        length: batches of a pass.
    """
    n = len(arrays[0])

    def runs(epoch: int, start: int, most: Limit) -> Iterator[Chunk]:
        rows = order(epoch)
        while start < length:
            count = most(max(1, n // size - start))
            first = take(of_batch(rows, start, size, n))
            sources: dict[int, RowGather] = {}
            if count > 1:
                index = slice(start * size, n) if rows is None else rows[start * size :]
                leaves = zip(jax.tree_util.tree_leaves(first), arrays, strict=True)
                sources = {id(a): RowGather(whole, index, size) for a, whole in leaves}
            yield Chunk(first, count, sources)
            start += count

    return runs


@contextlib.contextmanager
def open_items(data: Iterable[Any], expected: str) -> Generator[Iterator[Any]]:
    """An iterator over the data, closed at the end if it was made here.

    Raises:
        TypeError: with the text ``expected``, when it cannot be iterated.
        RuntimeError: when it would fork its workers.
    """
    convert.refuse_forks(data, f"data ({type(data).__name__})")
    try:
        iterator = iter(data)
    except TypeError:
        raise TypeError(expected) from None
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None and iterator is not data:
            close()


def one_by_one(items: Iterator[Any]) -> Iterator[Chunk]:
    """Each item by itself."""
    for item in items:
        yield Chunk(item, 1, {})


def mapped(runs: Chunks | None, call: Callable[[int, Any], Any]) -> Chunks | None:
    """The items ``call(i, item)``, for a ``call`` that hands the arrays of the item on as they are."""
    if runs is None:
        return None

    def made(epoch: int, start: int, most: Limit) -> Iterator[Chunk]:
        for run in runs(epoch, start, most):
            yield run._replace(item=call(start, run.item))
            start += run.n

    return made


def chained(runs: Chunks | None, n: int, length: int | None) -> Chunks | None:
    """The items of ``n`` passes of ``length`` items, one after the other."""
    if runs is None or not length:
        return None

    def made(epoch: int, start: int, most: Limit) -> Iterator[Chunk]:
        first, within = divmod(start, length)
        for e in range(first, n):
            yield from runs(epoch * n + e, within if e == first else 0, most)

    return made


def within(runs: Chunks | None, e: int) -> Chunks | None:
    """The items of pass ``e``, whatever the pass."""
    return None if runs is None else lambda epoch, start, most: runs(e, start, most)


def skipped(runs: Chunks | None, n: int) -> Chunks | None:
    """The items after the first ``n``."""
    return None if runs is None else lambda epoch, start, most: runs(epoch, start + n, most)


def taken(runs: Chunks | None, n: int) -> Chunks | None:
    """The first ``n`` items."""
    if runs is None:
        return None

    def made(epoch: int, start: int, most: Limit) -> Iterator[Chunk]:
        if start >= n:
            return
        left = [n - start]
        for run in runs(epoch, start, lambda more: most(min(more, left[0]))):
            left[0] -= run.n
            yield run
            if not left[0]:
                return

    return made
