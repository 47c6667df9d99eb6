"""Batches of rows of similar lengths, padded to the edge of their bucket."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np

from kaun import tree
from kaun.context import Context
from kaun.data.arguments import checked_count
from kaun.data.collate import outline_of, stack_all
from kaun.data.naming import noting_where
from kaun.data.nodes import GetItem, Node, index_node
from kaun.data.pieces import RowBlocks
from kaun.data.prefetch import snapshot_item
from kaun.data.rows import Padding, RowInfo, RowsItem

__all__ = ["Buckets", "bucket_node", "checked_edges", "checked_lengths"]

WHERE = "bucket(length, edges, batch_size)"
Host = np.ndarray[Any, Any]


def checked_edges(edges: Any) -> tuple[int, ...]:
    """The upper bounds of the buckets.

    Raises:
        TypeError: If they are not ints.
        ValueError: If there is none, one is below 1, or they do not rise.
    """
    if isinstance(edges, str) or not hasattr(edges, "__iter__"):
        raise TypeError(
            f"{WHERE} expected edges as a list of ints, received {tree.describe(edges)}. Write edges=[64, 128]."
        )
    found = tuple(checked_count(WHERE, "an edge", edge, 1) for edge in edges)
    if not found or any(b <= a for a, b in itertools.pairwise(found)):
        raise ValueError(
            f"{WHERE} expected edges that rise, at least one, received {list(found)}. Write edges=[64, 128, 256], the "
            "longest row that each bucket takes."
        )
    return found


def checked_lengths(lengths: Any, edges: Sequence[int], n: int) -> Host:
    """The lengths of ``n`` rows, int64 [n].

    Raises:
        TypeError: If they are not integers.
        ValueError: If there are not ``n`` of them, or one is below 1 or beyond the last edge.
    """
    array = np.asarray(lengths)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(
            f"{WHERE} expected a function from row to length, or the lengths of all rows as integers, received "
            f"{tree.describe(lengths)}. Write bucket(lambda row: len(row[0]), edges, batch_size)."
        )
    if array.shape != (n,):
        raise ValueError(
            f"{WHERE} expected one length for each row, shape [{n}], received shape {list(array.shape)}. Write "
            "np.array([len(row) for row in rows])."
        )
    wrong = np.flatnonzero((array < 1) | (array > edges[-1]))
    if wrong.size:
        raise _refused(int(wrong[0]), int(array[wrong[0]]), edges)
    return array.astype(np.int64)


def _refused(i: int, length: int, edges: Sequence[int]) -> ValueError:
    if length < 1:
        return ValueError(
            f"{WHERE} expected lengths of at least 1, received {length} for row {i} (counted from 0). Leave empty rows "
            "out, data.filter(lambda row: len(row[0]) > 0)."
        )
    return ValueError(
        f"{WHERE} expected rows of at most {edges[-1]}, the last edge, received {length} for row {i} (counted from 0). "
        f"Write edges={[*edges, length]}, where no row is longer, cut longer rows in map(f), or leave them out with "
        "filter(f)."
    )


class Buckets:
    """How rows are put together.

    Args:
        edges: The upper bounds of the buckets.
        size: Rows of a batch.

    Attributes:
        edges: As the argument.
    """

    def __init__(self, edges: Sequence[int], size: int) -> None:
        self.edges: Sequence[int] = edges
        self._size = size

    def length_of(self, length: Callable[[Any], Any], i: int, row: Any) -> int:
        """The length of row ``i``, checked."""
        found = checked_count(WHERE, "the length of a row", length(row), 0)
        if not 1 <= found <= self.edges[-1]:
            raise _refused(i, found, self.edges)
        return found

    def groups(self, lengths: Host) -> list[Host]:
        """The rows of each batch, in the order of their last rows; batches that are not full come at the end."""
        found: list[tuple[int, Host]] = []
        bucket = np.searchsorted(self.edges, lengths)
        for k in range(len(self.edges)):
            rows = np.flatnonzero(bucket == k)
            groups = [rows[i : i + self._size] for i in range(0, len(rows), self._size)]
            found += [(int(g[-1]) if len(g) == self._size else len(lengths) + k, g) for g in groups]
        return [group for _, group in sorted(found, key=lambda pair: pair[0])]

    def padding(self, lengths: Host) -> Padding:
        """How much of a pass is filled; the same in any order."""
        counts = np.bincount(np.searchsorted(self.edges, lengths), minlength=len(self.edges))
        batches = -(-counts // self._size)
        places = int((batches * self._size * np.asarray(self.edges)).sum())
        rows, total = int(batches.sum()) * self._size, len(lengths)
        return Padding(total, rows - total, int(lengths.sum()), places - int(lengths.sum()))

    def stream(self, rows: Iterator[tuple[int, Any]]) -> Iterator[RowsItem]:
        """The batches of rows with their lengths, as ``groups`` orders them."""
        open_groups: list[list[tuple[int, Any]]] = [[] for _ in self.edges]
        for length, row in rows:
            k = int(np.searchsorted(self.edges, length))
            open_groups[k].append((length, row))
            if len(open_groups[k]) == self._size:
                group, open_groups[k] = open_groups[k], []
                yield self.batch(group)
        yield from map(self.batch, filter(None, open_groups))

    def batch(self, group: Sequence[tuple[int, Any]]) -> RowsItem:
        """The batch of some rows of one bucket with their lengths."""
        lengths, rows = zip(*group, strict=True)
        return self.part(lengths, rows.__getitem__, None)

    def part(self, lengths: Sequence[int], row: GetItem, blocks: RowBlocks | None) -> RowsItem:
        """The batch of some rows of one bucket, or its rows in some blocks.

        Args:
            lengths: The lengths of the rows.
            row: The function from the number of a row in the batch to the row.
            blocks: Which rows of the filled batch are read, None for all.
        """
        piece = None if blocks is None else blocks.piece(self._size)
        here = slice(None) if piece is None else piece.here
        n = len(lengths)
        # A row of the data fills the batch: any other number might be infinite or no class in the model or loss.
        lengths = [*lengths, *[lengths[-1]] * (self._size - n)]
        edge = self.edges[int(np.searchsorted(self.edges, lengths[0]))]
        numbers = np.minimum(np.arange(self._size), n - 1)[here].tolist()
        # A leaf as long as all rows of a part may have one length in all rows of the batch: a row of another length, if
        # there is one, tells these apart. Otherwise two processes might pad different leaves.
        same = len({lengths[i] for i in numbers}) == 1
        other = [i for i in range(n) if lengths[i] != lengths[numbers[0]]][:1] if same else []
        rows = {i: row(i) for i in dict.fromkeys([*numbers, *other])}
        flags = [_sequences(lengths[i], rows[i]) for i in rows]
        is_sequence = [all(column) for column in zip(*flags, strict=True)]
        item = stack_all([_padded(rows[i], is_sequence, edge) for i in numbers])
        mask, tokens = np.arange(self._size) < n, np.arange(edge) < np.array(lengths)[:, None]
        labels = is_sequence
        ctx = Context(attention_mask=tokens)
        if isinstance(item, (tuple, list)) and len(cast("Any", item)) in (2, 3):
            x, y, *own = cast("Any", item)
            before = len(jax.tree_util.tree_leaves(x))
            labels = is_sequence[before : before + len(jax.tree_util.tree_leaves(y))]
            names = Context(attention_mask=tokens[here], row_mask=mask[here])
            item = x, y, names.merge(own[0] if own else None)
        elements = tokens & mask[:, None] if labels and all(labels) else None
        return RowsItem(item, RowInfo(mask, None, elements, ctx, piece))


def _sequences(length: int, row: Any) -> list[bool]:
    """For each leaf of a row, whether its axis 0 has the length of the row."""
    flags = [bool(np.ndim(leaf)) and np.shape(leaf)[0] == length for leaf in jax.tree_util.tree_leaves(row)]
    if not any(flags):
        raise ValueError(
            f"{WHERE} expected rows with an array whose axis 0 has the length of the row, {length}, received "
            f"{outline_of(row)}: there is nothing to pad. Return the length of that axis, lambda row: len(row[0])."
        )
    return flags


def _padded(row: Any, is_sequence: Sequence[bool], edge: int) -> Any:
    leaves, structure = jax.tree_util.tree_flatten(row)
    if len(leaves) != len(is_sequence):
        return row  # stack_all says what differs
    return structure.unflatten(
        [_long(leaf, edge) if flag else leaf for leaf, flag in zip(leaves, is_sequence, strict=True)]
    )


def _long(leaf: Any, edge: int) -> Host:
    array = np.asarray(leaf)
    out = np.zeros((edge, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


def bucket_node(
    base: Node, length: Callable[[Any], Any] | Host, buckets: Buckets, stage: str, *, same: bool, fixed: bool
) -> Node:
    """The batches of rows of similar lengths.

    Args:
        base: The rows.
        length: The length of a row, or the lengths of all rows in their order.
        buckets: How rows are put together.
        stage: The stage as the pipeline prints it, for messages.
        same: Whether each pass has the same rows.
        fixed: Whether they also come in the same order.
    """
    if not callable(length):
        return _planned(base, length, buckets, stage)
    measure = noting_where(lambda pair: buckets.length_of(length, *pair), stage)
    lengths = None
    if same and base.by_index is not None:
        lengths = np.array([measure(i, (i, row)) for i, row in enumerate(base.open(None, 0))], np.int64)
        if fixed:
            return _planned(base, lengths, buckets, stage)

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        rows = enumerate(base.open(epoch, 0))
        batches = buckets.stream((measure(i, (i, row)), snapshot_item(row)) for i, row in rows)
        return itertools.islice(batches, start, None)

    padding = None if lengths is None else buckets.padding(lengths)
    n = None if lengths is None else len(buckets.groups(lengths))
    return Node(open, n, False, None, rows=frozenset({"where"}), padding=padding)


def _planned(base: Node, lengths: Host, buckets: Buckets, stage: str) -> Node:
    """The batches of rows whose lengths are known: any of them can be made at once."""
    groups, make = buckets.groups(lengths), noting_where(buckets.part, stage)

    def by_index(epoch: int | None, blocks: RowBlocks | None = None) -> GetItem:
        assert base.by_index is not None
        get = base.by_index(epoch)
        row = lambda i, k: snapshot_item(get(int(groups[i][k])))
        return lambda i: make(i, lengths[groups[i]].tolist(), functools.partial(row, i), blocks)

    def narrow(blocks: RowBlocks) -> Node:
        node = index_node(len(groups), functools.partial(by_index, blocks=blocks))
        return node._replace(rows=frozenset({"where", "local"}), padding=padding)

    padding, node = buckets.padding(lengths), index_node(len(groups), by_index)
    return node._replace(rows=frozenset({"where"}), padding=padding, narrow=narrow)
