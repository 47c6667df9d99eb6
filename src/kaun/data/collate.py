"""Rows of arrays in memory, and items stacked into batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np

from kaun import tree
from kaun.data.chunks import read_rows, rows_reader


class ArrayRows:
    """The rows of a tree of arrays of one length along axis 0.

    Args:
        where: The method of Data, for messages.
        arrays: NumPy or JAX arrays, or any pytree of them.

    Attributes:
        leaves: The arrays.
        length: How many rows each has.

    Raises:
        TypeError: If a leaf is not an array.
        ValueError: If lengths differ, an array is a scalar, or there is none.
    """

    def __init__(self, where: str, arrays: Any) -> None:
        pairs, self._treedef = jax.tree_util.tree_flatten_with_path(arrays)
        if not pairs:
            raise ValueError(f"{where} expected arrays, received none in {outline_of(arrays)}.")
        for path, leaf in pairs:
            _check_array(where, path, leaf)
        if len({len(leaf) for _, leaf in pairs}) > 1:
            lines = "".join(f"\n    {len(leaf)}{_at(path)}: {tree.describe(leaf)}" for path, leaf in pairs)
            raise ValueError(
                f"{where} expected arrays of the same length along axis 0, received lengths{lines}\n"
                "Slice them to the same length, x[:n], or check that axis 0 is the axis of items."
            )
        self.leaves: list[Any] = [leaf for _, leaf in pairs]
        self.length: int = len(self.leaves[0])
        self._gathers = [rows_reader(leaf) if isinstance(leaf, jax.Array) else None for leaf in self.leaves]
        self._readers = [
            _view(leaf) if gather is None else functools.partial(read_rows, gather)
            for leaf, gather in zip(self.leaves, self._gathers, strict=True)
        ]

    def take(self, index: Any) -> Any:
        """The tree of the rows at an index, a slice or an index array."""
        return self._treedef.unflatten([read(index) for read in self._readers])

    def batches(self, order: Any, size: int, start: int, stop: int) -> Iterator[Any]:
        """The batches number ``start`` to ``stop`` of ``size`` rows, in an order or, where it is None, the rows' own.

        Made of iterators in C: ``fit`` pulls one for each step, and each call of Python costs 0.1 us or more.
        """
        columns: list[Iterator[Any]] = []
        for gather, read in zip(self._gathers, self._readers, strict=True):
            first = range(start * size, stop * size, size)
            last = map(min, range((start + 1) * size, (stop + 1) * size, size), itertools.repeat(self.length))
            if order is not None:
                index = map(order.__getitem__, map(slice, first, last))
            else:
                index = map(slice if gather is None else np.arange, first, last)
            columns.append(map(gather or read, index))
        return map(self._treedef.unflatten, zip(*columns, strict=True))


def _check_array(where: str, path: Any, leaf: Any) -> None:
    if not tree.is_array(leaf):
        raise TypeError(
            f"{where} expected NumPy or JAX arrays, received {tree.describe(leaf)}{_at(path)}. Convert it first, "
            "np.asarray(x); use Data.from_items for a list of items, Data.from_fn(n, f) for what is read by index."
        )
    if leaf.ndim == 0:
        raise ValueError(
            f"{where} expected arrays with a leading axis of items, received {tree.describe(leaf)}{_at(path)}. "
            "Pass an array with one value for each item, np.full(n, value), or add the value in map(f)."
        )


def _view(array: Any) -> Callable[[Any], Any]:
    view = array.view()
    view.flags.writeable = False  # a batch is a view of the user's array, which must not change by accident
    return view.__getitem__


def stack_all(items: list[Any]) -> Any:
    if not items:
        raise ValueError("Data.stack expected at least one item, received none.")
    pairs, treedef = jax.tree_util.tree_flatten_with_path(items[0])
    columns: list[list[Any]] = []
    for k, item in enumerate(items):
        leaves, found = jax.tree_util.tree_flatten(item)
        if found != treedef:
            raise ValueError(
                f"Data.stack expected items of the same structure, received {outline_of(items[0])} at item 0 and "
                f"{outline_of(item)} at item {k}. Convert them with data.map(f), or collate them with map_batch(n, f)."
            )
        columns.append([_as_numbers(path, k, leaf) for (path, _), leaf in zip(pairs, leaves, strict=True)])
    stacked: list[Any] = []
    for (path, _), column in zip(pairs, zip(*columns, strict=True), strict=True):
        first = column[0]
        for k, array in enumerate(column):
            if array.shape != first.shape or array.dtype != first.dtype:
                raise ValueError(
                    f"Data.stack expected arrays of the same shape and dtype{_at(path)}, received "
                    f"{tree.describe(first)} in item 0 and {tree.describe(array)} in item {k}. Pad or convert them "
                    "with data.map(f), or collate them with map_batch(n, f)."
                )
        stacked.append(np.stack(column))
    return treedef.unflatten(stacked)


def _as_numbers(path: Any, k: int, leaf: Any) -> Any:
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"Data.stack expected arrays without a mask, received a masked {tree.describe(leaf)}{_at(path)} of item "
            f"{k}. Pass values and mask as two arrays, data.map(lambda a: (a.filled(0), ~np.ma.getmaskarray(a)))."
        )
    is_key = tree.is_key(leaf)
    array = None if is_key else np.asarray(leaf)
    if array is None or array.dtype.kind not in "biufcV" or array.dtype.fields is not None:
        is_of_objects = isinstance(leaf, np.ndarray) and leaf.dtype == object
        raise TypeError(
            f"Data.stack expected numbers and arrays of numbers, received {tree.describe(leaf)}{_at(path)} of item "
            f"{k}. {'Pad its parts to one shape' if is_of_objects else 'Remove it'} with data.map(f), or collate the "
            "items with map_batch(n, f)."
        )
    return array


def outline_of(value: Any) -> str:
    """A tree in a few characters, arrays by dtype and shape."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {outline_of(v)}" for k, v in cast("dict[Any, Any]", value).items()) + "}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(outline_of(v) for v in cast("Sequence[Any]", value)) + right
    return tree.describe(value)


def _at(path: Sequence[Any]) -> str:
    return f" at {tree.path_name(path)!r}" if path else ""
