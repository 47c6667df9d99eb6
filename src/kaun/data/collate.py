"""Rows of arrays in memory, and items stacked into batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun.data.chunks import read_rows


def rows_of(where: str, arrays: Any) -> tuple[int, Callable[[Any], Any]]:
    """The length of a tree of arrays along axis 0, and the function from an index, slice or index array to its rows."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    if not pairs:
        raise ValueError(f"{where} expected arrays, received none in {outline_of(arrays)}.")
    gets: list[Callable[[Any], Any]] = []
    for path, leaf in pairs:
        if not tree.is_array(leaf):
            raise TypeError(
                f"{where} expected NumPy or JAX arrays, received {tree.describe(leaf)}{_at(path)}. Convert it first, "
                "np.asarray(x); use Data.from_items for a list of items, Data.from_fn(n, f) for what is read by index."
            )
        if leaf.ndim == 0:
            raise ValueError(
                f"{where} expected arrays with a leading axis of items, received {tree.describe(leaf)}{_at(path)}. "
                "Give it one per item, np.full(n, value), or add it in map(f)."
            )
        gets.append(_reader(leaf))
    if len({len(leaf) for _, leaf in pairs}) > 1:
        lines = "".join(f"\n    {len(leaf)}{_at(path)}: {tree.describe(leaf)}" for path, leaf in pairs)
        raise ValueError(
            f"{where} expected arrays of one length along axis 0, received lengths{lines}\n"
            "Cut them to one, x[:n], or check that the axis of items comes first."
        )
    return len(pairs[0][1]), lambda index: treedef.unflatten([get(index) for get in gets])


def _reader(array: Any) -> Callable[[Any], Any]:
    if isinstance(array, jax.Array):
        return functools.partial(read_rows, array)
    view = array.view()
    view.flags.writeable = False  # a batch is a window on the user's array: no one writes through it by accident
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
                f"Data.stack expected items of one structure, received {outline_of(items[0])} at item 0 and "
                f"{outline_of(item)} at item {k}. Make them alike, data.map(f), or collate them with map_batch(n, f)."
            )
        columns.append([_as_numbers(path, k, leaf) for (path, _), leaf in zip(pairs, leaves, strict=True)])
    stacked: list[Any] = []
    for (path, _), column in zip(pairs, zip(*columns, strict=True), strict=True):
        first = column[0]
        for k, array in enumerate(column):
            if array.shape != first.shape or array.dtype != first.dtype:
                raise ValueError(
                    f"Data.stack expected arrays of one shape and dtype{_at(path)}, received {tree.describe(first)} in "
                    f"item 0 and {tree.describe(array)} in item {k}. Pad or convert them, data.map(f), or collate them "
                    "with map_batch(n, f)."
                )
        stacked.append(np.stack(column))
    return treedef.unflatten(stacked)


def _as_numbers(path: Any, k: int, leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    array = None if is_key else np.asarray(leaf)
    if array is None or array.dtype.kind not in "biufcV" or array.dtype.fields is not None:
        is_of_objects = isinstance(leaf, np.ndarray) and leaf.dtype == object
        raise TypeError(
            f"Data.stack expected numbers and arrays of numbers, received {tree.describe(leaf)}{_at(path)} of item "
            f"{k}. {'Pad its parts to one shape' if is_of_objects else 'Leave it out'}, data.map(f), or collate the "
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
