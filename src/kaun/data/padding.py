"""Batches of arrays in memory whose last one is filled, whose rows have weights, or which have some of their rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun import tree
from kaun.data.arguments import checked_weights
from kaun.data.chunks import Chunk, Limit, RowGather, is_explicit
from kaun.data.collate import ArrayRows
from kaun.data.nodes import GetItem, Node, batches_node, group_count, index_node
from kaun.data.pieces import RowBlocks
from kaun.data.rows import Padding, RowInfo, RowsItem

__all__ = ["RowOptions", "row_batches_node"]

Order = Callable[[int | None], Any]


class RowOptions(NamedTuple):
    """The arguments ``pad`` and ``sample_weights``, checked.

    Attributes:
        pad: Whether the last batch is filled.
        weights: The weight of each row, float [rows], or None.
    """

    pad: bool
    weights: np.ndarray[Any, Any] | None

    @classmethod
    def checked(cls, where: str, pad: Any, sample_weights: Any, n: int, *, drop_last: bool = False) -> RowOptions:
        """The arguments, checked for ``n`` rows.

        Raises:
            TypeError: If the weights are not numbers.
            ValueError: With both ``pad`` and ``drop_last``; or if there are not ``n`` weights, one is negative or not
                finite, or all are 0.
        """
        if pad and drop_last:
            raise ValueError(
                f"{where} expected one of pad=True, which fills the last batch, and drop_last=True, which leaves it "
                "out, received both. Leave one of them out."
            )
        if sample_weights is None:
            return cls(bool(pad), None)
        weights = checked_weights(where, sample_weights, n, "row", "sample_weights")
        # Checked again in the dtype of the compiled step, where float64 weights may be infinite or all 0.
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        with np.errstate(over="ignore"):
            weights = weights.astype(dtype)
        return cls(bool(pad), _read_only(checked_weights(where, weights, n, "row", "sample_weights").astype(dtype)))

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that the user wrote, by name."""
        return ({"pad": True} if self.pad else {}) | ({} if self.weights is None else {"sample_weights": self.weights})

    @property
    def text(self) -> str:
        """The same as the pipeline prints it."""
        weights = "" if self.weights is None else f", sample_weights={tree.describe(self.weights)}"
        return ", pad=True" * self.pad + weights


def row_batches_node(
    rows: ArrayRows, size: int, options: RowOptions, order: Order, n: int | None = None, *, drop_last: bool = False
) -> Node:
    """The batches of arrays in memory, as ``batches_node``, with ``pad`` and ``sample_weights``."""
    found = _RowBatches(rows, size, options, order, rows.length if n is None else n, drop_last)
    if not options.pad and options.weights is None:
        return batches_node(rows, size, drop_last, order, n)._replace(narrow=found.narrow)
    return index_node(found.length, found.by_index)._replace(
        chunks=found.chunks, rows=found.known, padding=found.padding, narrow=found.narrow
    )


class _RowBatches:
    """The batches of arrays in memory.

    Args:
        rows: The arrays.
        size: Rows of a batch.
        options: Whether to fill the last batch, and the weights.
        order: The order of the rows in a pass, None for their own.
        n: How many rows a pass has.
        drop_last: Whether a last batch that is smaller is left out.

    Attributes:
        length: The number of batches of a pass.
        known: What is known of their rows, see ``nodes.Node``.
        padding: How much of a pass is filled, None without ``pad``.
    """

    def __init__(self, rows: ArrayRows, size: int, options: RowOptions, order: Order, n: int, drop_last: bool) -> None:
        self._rows, self._size, self._order = rows, size, order
        self._n = n
        self._weights = options.weights
        self.length: int = group_count(n, size, drop_last)
        names = (options.pad and "where", options.weights is not None and "weights")
        self.known: frozenset[str] = frozenset(name for name in names if name)
        self.padding: Padding | None = Padding(n, self.length * size - n) if options.pad else None
        self._total = self.length * size if options.pad else n
        self._mask = _read_only(np.arange(self._total) < n) if options.pad else None
        # Rows are found again by the identity of the first item's arrays, and those on explicit axes are replaced.
        self._alone = any(is_explicit(array) for array in rows.leaves)

    def by_index(self, epoch: int | None, blocks: RowBlocks | None = None) -> GetItem:
        """The function from index to batch of one pass, or to the rows of a batch that some blocks have."""
        order = self._filled_order(epoch)
        return lambda i: self._batch(order, i, blocks)

    def narrow(self, blocks: RowBlocks) -> Node:
        """The node of the batches of which these blocks have the rows, see ``nodes.Node``."""
        node = index_node(self.length, functools.partial(self.by_index, blocks=blocks))
        return node._replace(rows=self.known | {"local"}, padding=self.padding)

    def chunks(self, epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        """The batches of a pass, several at a time, see ``chunks.Chunks``."""
        order, size, total = self._filled_order(epoch), self._size, self._total
        while start < self.length:
            count = 1 if self._alone else limit(max(1, total // size - start))
            first = self._batch(order, start)
            sources: dict[int, RowGather] = {}
            if count > 1:
                here = slice(start * size, total)
                index = here if order is None else order[here]
                leaves = zip(jax.tree_util.tree_leaves(first.item), self._rows.leaves, strict=True)
                sources = {id(a): RowGather(whole, index, size) for a, whole in leaves}
                sources[id(first.rows.mask)] = RowGather(self._mask, here, size)
                sources[id(first.rows.weights)] = RowGather(self._weights, index, size)
            yield Chunk(first, count, sources)
            start += count

    def _filled_order(self, epoch: int | None) -> Any:
        """The order of the rows in a pass, None for their own; at its end the last row again, to fill the last batch.

        A row of the data, because any other number might be infinite or no class in the model or loss.
        """
        order = self._order(epoch)
        more = self._total - self._n
        return order if order is None or more <= 0 else np.concatenate([order, np.full(more, order[-1])])

    def _batch(self, order: Any, i: int, blocks: RowBlocks | None = None) -> RowsItem:
        at = slice(i * self._size, min((i + 1) * self._size, self._total))
        index: Any = at if order is None else order[at]
        if order is None and at.stop > self._n:
            index = np.minimum(np.arange(at.start, at.stop), self._n - 1)
        weights = None if self._weights is None else self._weights[index]
        piece = None if blocks is None else blocks.piece(at.stop - at.start)
        rows = RowInfo(None if self._mask is None else self._mask[at], weights, piece=piece)
        return RowsItem(self._rows.take(index if piece is None else piece.of(index)), rows)


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False  # batches have views of it
    return array
