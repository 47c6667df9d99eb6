"""The outputs of a pass over data, concatenated on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun.data import RowInfo

__all__ = ["Outputs", "padded_size"]

Host = np.ndarray[Any, Any]


class Outputs:
    """The outputs of a model for all items, concatenated along axis 0 on the host.

    Args:
        length: How many items there are, None if that is unknown.
    """

    def __init__(self, length: int | None) -> None:
        self._length = length or 1
        self.structure: Any = None
        self._checked: Any = None
        self._first: list[Any] = []
        self._buffers: list[Any] = []
        self._used: list[int] = []

    def check(self, output: Any, number: int, known: RowInfo | None) -> None:
        """Raise ValueError for an output that cannot follow those before it; only shapes and dtypes are checked."""
        arrays, structure = jax.tree_util.tree_flatten(output)
        size = padded_size(known)
        form = (structure, size, [(array.shape, array.dtype) for array in arrays])
        if form == self._checked:
            return
        leaves = tree.flatten(output)[0]
        scalar = next((path for path, leaf in leaves.items() if not leaf.shape), None)
        if scalar is not None:
            raise ValueError(
                f"predict concatenates the outputs of a Data along axis 0, but the output{_at(scalar)} of item "
                f"{number} is a scalar. Call predict for each item: [trainer.predict(state, x) for x in data]."
            )
        other = next((path for path, leaf in leaves.items() if size not in (None, leaf.shape[0])), None)
        if other is not None:
            raise ValueError(
                f"predict cuts filled rows off the outputs of a padded Data, but the output{_at(other)} of item "
                f"{number} has {leaves[other].shape[0]} rows for {size} of x: it is not known which are filled. Return "
                "one row for each of x, or leave pad=True out."
            )
        rows = [(leaf.shape[1:], leaf.dtype) for leaf in leaves.values()]
        if self.structure is None:
            self.structure, self._first = structure, rows
        if structure != self.structure or rows != self._first:
            raise ValueError(
                "predict concatenates the outputs of a Data along axis 0, but these of item "
                f"{number} differ from those before in more than that axis: "
                + ", ".join(f"{path or 'output'}: {tree.describe(leaf)}" for path, leaf in leaves.items())
                + ". Pad the inputs to one shape, or call predict for each item."
            )
        self._checked = form

    def take(self, arrays: Sequence[Host], known: Sequence[RowInfo | None]) -> None:
        """Append the outputs of some items, arrays with an axis of items in front, without filled rows."""
        if not self._buffers:
            self._buffers = [np.empty((self._length * a.shape[1], *a.shape[2:]), a.dtype) for a in arrays]
            self._used = [0] * len(arrays)
        start = 0
        for i, rows in enumerate(known):
            if rows is not None and rows.has_filled:
                self._append([_joined(a[start:i]) for a in arrays])
                self._append(rows.real([a[i] for a in arrays]))
                start = i + 1
        self._append([_joined(a[start:]) for a in arrays])

    def _append(self, leaves: Sequence[Host]) -> None:
        for i, new in enumerate(leaves):
            start, end = self._used[i], self._used[i] + len(new)
            if end > len(self._buffers[i]):
                grown = np.empty((max(end, 2 * start), *new.shape[1:]), new.dtype)
                grown[:start] = self._buffers[i][:start]
                self._buffers[i] = grown
            self._buffers[i][start:end] = new
            self._used[i] = end

    def rows(self) -> list[Any]:
        """The arrays, without the space that was not filled."""
        return [buffer[:used] for buffer, used in zip(self._buffers, self._used, strict=True)]


def padded_size(rows: RowInfo | None) -> int | None:
    """How many rows a batch has with those that fill it, None if none may be filled."""
    return None if rows is None or rows.mask is None else len(rows.mask)


def _joined(array: Host) -> Host:
    """The rows of several items, [items, rows, ...], along one axis."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""
