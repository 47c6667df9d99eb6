"""Stages over several pipelines, and a filter: one pass of them is made of the same pass of each."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kaun.data.chunks import Chunk, Chunks, Limit
from kaun.data.naming import noting_where
from kaun.data.nodes import GetItem, Node, map_node
from kaun.data.pieces import RowBlocks
from kaun.data.prefetch import snapshot_item
from kaun.data.rows import RowsItem, plain_item
from kaun.data.shuffle import Draws

__all__ = ["concat_node", "filter_node", "mix_node", "zip_node"]

_END = object()
_BLOCK = 4096  # draws of a mix that are made at once


def concat_node(bases: Sequence[Node]) -> Node:
    """The items of each pipeline, one pipeline after the other."""
    lengths = _lengths(bases)

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        for base in bases:
            if base.seekable and base.length is not None:
                if start < base.length:
                    yield from base.open(epoch, start)
                start = max(0, start - base.length)
            else:  # only its items say how many they are
                for item in base.open(epoch, 0):
                    if start:
                        start -= 1
                    else:
                        yield item
                        del item

    ends = None if lengths is None else list(itertools.accumulate(lengths))
    by_index = None
    if ends is not None and all(base.by_index for base in bases):
        by_index = _joined(bases, [0, *ends[:-1]])
    length, rows, narrow = None if ends is None else ends[-1], _rows(bases), _narrow_all(bases, concat_node)
    return Node(open, length, _all_seekable(bases), by_index, _concat_chunks(bases), rows=rows, narrow=narrow)


def _joined(bases: Sequence[Node], starts: list[int]) -> Callable[[int | None], GetItem]:
    def by_index(epoch: int | None) -> GetItem:
        views = _views(bases, epoch)

        def get(i: int) -> Any:
            k = bisect.bisect_right(starts, i) - 1
            return views[k](i - starts[k])

        return get

    return by_index


def _concat_chunks(bases: Sequence[Node]) -> Chunks | None:
    if not _all_seekable(bases) or not all(base.chunks for base in bases):
        return None

    def chunks(epoch: int | None, start: int, limit: Limit) -> Iterator[Chunk]:
        for base in bases:
            assert base.length is not None and base.chunks is not None
            if start < base.length:
                yield from base.chunks(epoch, start, limit)
            start = max(0, start - base.length)

    return chunks


def zip_node(bases: Sequence[Node], stage: str) -> Node:
    """Tuples of the items of each pipeline. It is an error if one ends before another."""

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        if _all_seekable(bases):
            yield from zip(*(base.open(epoch, start) for base in bases), strict=True)
            return
        # Those that cannot seek are pulled in turn also while items are skipped, because loaders may draw from one
        # generator. An item of a stream is kept while the next stream is pulled, which may fill the same buffer.
        items = [base.open(epoch, start if base.seekable else 0) for base in bases]
        for i in itertools.count():
            found: list[Any] = []
            for base, each in zip(bases, items, strict=True):
                if base.seekable and i < start:
                    found.append(_END if i >= (base.length or 0) else None)
                else:
                    found.append(snapshot_item(next(each, _END)) if base.by_index is None else next(each, _END))
            ended = [k for k, item in enumerate(found) if item is _END]
            if len(ended) == len(bases):
                return
            if ended:
                raise _uneven(stage, i, ended)
            if i >= start:
                yield tuple(found)

    lengths = _lengths(bases)
    by_index = None
    if all(base.by_index for base in bases):
        by_index = lambda epoch: _tuples(_views(bases, epoch))
    length, narrow = None if lengths is None else min(lengths), _narrow_all(bases, lambda all: _zipped(all, stage))
    return Node(open, length, _all_seekable(bases), by_index, narrow=narrow)


def _zipped(bases: Sequence[Node], stage: str) -> Node:
    """The tuples of rows of batches of each pipeline."""

    def joined(items: Sequence[RowsItem]) -> RowsItem:
        pieces = [each.rows.piece for each in items if each.rows.piece is not None]
        totals = [piece.total for piece in pieces]
        if len(set(totals)) > 1:
            raise ValueError(
                f"{stage} expected batches of as many rows for local(s), received {', '.join(map(str, totals))}. Give "
                "each source the same batch_size."
            )
        return RowsItem(tuple(each.item for each in items), items[0].rows)

    node = map_node(zip_node(bases, stage), joined, stage, takes_rows=True)
    return node._replace(rows=frozenset({"local"}))


def _tuples(views: Sequence[GetItem]) -> GetItem:
    return lambda i: tuple(view(i) for view in views)


def _uneven(stage: str, i: int, ended: list[int]) -> ValueError:
    which = f"source {ended[0]}" if len(ended) == 1 else f"sources {', '.join(map(str, ended))}"
    return ValueError(
        f"{stage} expected sources of the same length: {which} (counted from 0) ended after {i} items, and another has "
        f"more. Take as many of each: Data.zip(a.take({i}), b.take({i}))."
    )


def mix_node(bases: Sequence[Node], draws: Draws) -> Node:
    """Items of several pipelines, each from a source that is drawn by weight; it ends where the drawn one has ended."""
    lengths, rows = _lengths(bases), _rows(bases)
    if lengths is None:
        return Node(lambda epoch, start: _pulled_mix(bases, draws, epoch, start), None, False, None, rows=rows)
    source, position = _mixture(draws, lengths)
    n = len(source)
    if not _all_seekable(bases):
        return Node(lambda epoch, start: _pulled_mix(bases, draws, epoch, start), n, False, None, rows=rows)

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        opened: dict[int, Iterator[Any]] = {}
        for i in range(start, n):
            k = int(source[i])
            if k not in opened:
                opened[k] = bases[k].open(epoch, int(position[i]))
            yield next(opened[k])

    def by_index(epoch: int | None) -> GetItem:
        views = _views(bases, epoch)
        return lambda i: views[source[i]](int(position[i]))

    narrow = _narrow_all(bases, lambda narrowed: mix_node(narrowed, draws))
    return Node(open, n, True, by_index if all(base.by_index for base in bases) else None, rows=rows, narrow=narrow)


def _mixture(draws: Draws, lengths: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The source of each item, and the number of the item in its source, up to where a drawn source has ended."""
    taken = np.zeros(len(lengths), np.int64)
    sources: list[np.ndarray[Any, Any]] = []
    positions: list[np.ndarray[Any, Any]] = []
    while not sources or np.all(taken <= lengths):
        block = draws(len(sources), _BLOCK)
        position = np.empty(_BLOCK, np.int64)
        for k in range(len(lengths)):
            here = np.flatnonzero(block == k)
            position[here] = np.arange(taken[k], taken[k] + len(here))
            taken[k] += len(here)
        sources.append(block.astype(np.min_scalar_type(len(lengths))))
        positions.append(position)
    source, position = np.concatenate(sources), np.concatenate(positions)
    n = int(np.flatnonzero(position >= np.asarray(lengths)[source])[0])
    return source[:n].copy(), position[:n].copy()


def _pulled_mix(bases: Sequence[Node], draws: Draws, epoch: int | None, start: int) -> Iterator[Any]:
    """The mix where a source cannot seek or has no length: such a source is pulled also for items that are skipped."""
    opened: dict[int, Iterator[Any]] = {}
    taken = [0] * len(bases)
    blocks = (draws(b, _BLOCK).tolist() for b in itertools.count())
    for i, k in enumerate(itertools.chain.from_iterable(blocks)):
        if i < start and bases[k].seekable:
            if taken[k] >= (bases[k].length or 0):
                return
        else:
            if k not in opened:
                opened[k] = bases[k].open(epoch, taken[k])
            item = next(opened[k], _END)
            if item is _END:
                return
            if i >= start:
                yield item
            del item
        taken[k] += 1


def filter_node(base: Node, f: Callable[[Any], Any], stage: str) -> Node:
    """The items for which ``f(item)`` is true. Only ``f`` says how many they are, so ``start`` items are made again."""
    keeps = noting_where(lambda item: bool(f(plain_item(item))), stage)

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        for i, item in enumerate(base.open(epoch, 0)):
            if keeps(i, item):
                if start:
                    start -= 1
                else:
                    yield item
            del item

    return Node(open, None, False, None, rows=base.rows, padding=base.padding)


def _rows(bases: Sequence[Node]) -> frozenset[str]:
    """What is known of the rows of some of the items."""
    return frozenset[str]().union(*(base.rows for base in bases))


def _narrow_all(bases: Sequence[Node], make: Callable[[Sequence[Node]], Node]) -> Callable[[RowBlocks], Node] | None:
    """The ``narrow`` of a stage of several pipelines, None if one of them has none."""
    found = [base.narrow for base in bases if base.narrow is not None]
    return (lambda blocks: make([narrow(blocks) for narrow in found])) if len(found) == len(bases) else None


def _lengths(bases: Sequence[Node]) -> list[int] | None:
    """The lengths of all, None where one is not known."""
    known = [base.length for base in bases if base.length is not None]
    return known if len(known) == len(bases) else None


def _all_seekable(bases: Sequence[Node]) -> bool:
    return all(base.seekable for base in bases)


def _views(bases: Sequence[Node], epoch: int | None) -> list[GetItem]:
    return [base.by_index(epoch) for base in bases if base.by_index is not None]
