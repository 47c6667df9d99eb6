"""The stages of a ``Data`` pipeline: what runs when one is iterated. Nothing here knows ``Data``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from kaun.data.chunks import (
    Chunks,
    batch_index,
    chain_chunks,
    item_chunks,
    map_chunks,
    pass_chunks,
    row_chunks,
    skip_chunks,
    take_chunks,
)
from kaun.data.collate import ArrayRows
from kaun.data.loaders import ResumableLoader, known_length, open_loader
from kaun.data.prefetch import prefetched, snapshot_item

GetItem = Callable[[int], Any]
"""The function from index to item of one pass."""


class Node(NamedTuple):
    """What a stage does. Passes (epochs) and items count from 0; only a shuffle depends on the pass.

    Attributes:
        open: ``open(epoch, start)`` iterates one pass from its item ``start`` on.
        length: the number of items of a pass, None if it is not known.
        seekable: whether ``start`` costs nothing and ``length`` is exact (what a loader says of its length may be
            wrong).
        by_index: ``by_index(epoch)`` is the function from index to item that a shuffle needs, None for a stream.
        chunks: iterates a pass several items at a time, see ``chunks.Chunks``; None if that gains nothing.
        resume: how the stage is opened again from a position of its loader, None if that is not known.
    """

    open: Callable[[int, int], Iterator[Any]]
    length: int | None
    seekable: bool
    by_index: Callable[[int], GetItem] | None
    chunks: Chunks | None = None
    resume: Resume | None = None


class Resume(NamedTuple):
    """How a stage over a loader is opened again: for stages that keep nothing between two of their items.

    Attributes:
        node: ``node(loader, n)`` is the rest of the stage after ``n`` of its items; the loader is where it was
            then, in its pass number ``loader.passes``.
        whole_passes: whether each pass of the stage is a whole pass of the loader.
    """

    node: Callable[[ResumableLoader, int], Node]
    whole_passes: bool


class StageSpec(NamedTuple):
    """One stage as the user wrote it.

    Attributes:
        text: as the pipeline prints it.
        given: its parameters by name; arrays, functions and keys as they are.
        length: the number of items of a pass after it, None if it is not known.
    """

    text: str
    given: Mapping[str, Any]
    length: int | None

    @property
    def name(self) -> str:
        """The method of Data, ``"Data.map"``."""
        return "Data." + self.text.partition("(")[0].removeprefix("Data").removeprefix(".")


# Sources


def index_node(n: int, by_index: Callable[[int], GetItem]) -> Node:
    """``n`` items, each made of its index."""
    return Node(lambda epoch, start: map(by_index(epoch), range(start, n)), n, True, by_index)


def repeat_node(n: int, item: Any) -> Node:
    """The same item ``n`` times."""
    opened = lambda epoch, start: itertools.repeat(item, n - start)
    return Node(opened, n, True, lambda epoch: lambda i: item, item_chunks(item, n))


def batches_node(rows: ArrayRows, size: int, drop_last: bool, order: Callable[[int], Any]) -> Node:
    """The batches of arrays in memory.

    Args:
        rows: the arrays.
        size: rows of a batch.
        drop_last: whether a last batch that is smaller is left out.
        order: the order of the rows in a pass, None for their own.
    """
    length = group_count(rows.length, size, drop_last)

    def by_index(epoch: int) -> GetItem:
        index = order(epoch)
        return lambda i: rows.take(batch_index(index, i, size, rows.length))

    opened = lambda epoch, start: rows.batches(order(epoch), size, start, length)
    return Node(opened, length, True, by_index, row_chunks(rows.leaves, rows.take, order, size, length))


def loader_node(source: Any, stage: str) -> Node:
    """The items of a loader, or of the loader that a function makes in each pass."""
    length = known_length(source)
    rest = lambda loader, n: loader_node(loader, stage)._replace(length=None if n else length)
    by_items = isinstance(source, (list, tuple, range))  # the position in them is a number of items
    return Node(open_loader(source, stage), length, False, None, resume=None if by_items else Resume(rest, True))


# Stages


def map_node(base: Node, f: Callable[[Any], Any], stage: str, *, keeps_arrays: bool = False) -> Node:
    """The items ``f(item)``.

    Args:
        base: the stage before.
        f: the function.
        stage: the stage as the pipeline prints it, for messages.
        keeps_arrays: whether ``f`` reads no array of an item, and passes all of them on.
    """
    call = noting_where(f, stage)

    def open(epoch: int, start: int) -> Iterator[Any]:
        # One frame for each item, and not `call`: fit pulls an item for each step.
        i = start
        for item in base.open(epoch, start):
            try:
                made = f(item)
            except Exception as error:
                _note_where(error, stage, i)
                raise
            yield made
            i += 1

    by_index = _by_index_of(base, lambda get: lambda i: call(i, get(i)))
    chunks = map_chunks(base.chunks, call) if keeps_arrays else None
    resume = _resume_of(base, lambda node, n: map_node(node, f, stage))
    return base._replace(open=open, by_index=by_index, chunks=chunks, resume=resume)


def group_node(base: Node, size: int, f: Callable[[list[Any]], Any], drop_last: bool, stage: str) -> Node:
    """The items ``f`` of each list of ``size`` consecutive items."""
    call, total = noting_where(f, stage), base.length or 0

    def open(epoch: int, start: int) -> Iterator[Any]:
        source = base.open(epoch, start * size)
        for i in itertools.count(start):
            group = [snapshot_item(item) for item in itertools.islice(source, size)]
            if len(group) == size or (group and not drop_last):
                yield call(i, group)
            if len(group) < size:
                return

    def indices(i: int) -> range:
        return range(i * size, min(i * size + size, total))

    by_index = _by_index_of(base, lambda get: lambda i: call(i, [snapshot_item(get(j)) for j in indices(i)]))
    length = None if base.length is None else group_count(base.length, size, drop_last)
    resume = _resume_of(base, lambda node, n: group_node(node, size, f, drop_last, stage), size=size)
    return Node(open, length, base.seekable, by_index, resume=resume)


def group_count(n: int, size: int, drop_last: bool) -> int:
    """How many groups of ``size`` there are in ``n`` items."""
    return n // size if drop_last else -(-n // size)


def shuffle_node(by_index: Callable[[int], GetItem], n: int, order: Callable[[int], Any]) -> Node:
    """``n`` items in the order of the pass."""

    def shuffled(epoch: int) -> GetItem:
        get, rows = by_index(epoch), order(epoch)
        return lambda i: get(int(rows[i]))

    return index_node(n, shuffled)


def epochs_node(base: Node, count: int) -> Node:
    """``count`` passes, one after the other."""
    length = base.length

    def open(epoch: int, start: int) -> Iterator[Any]:
        if not base.seekable or length is None:
            whole = (base.open(epoch * count + e, 0) for e in range(count))
            return itertools.islice(itertools.chain.from_iterable(whole), start, None)
        if length == 0:
            return iter(())
        first, within = divmod(start, length)
        rest = (base.open(epoch * count + e, within if e == first else 0) for e in range(first, count))
        return itertools.chain.from_iterable(rest)

    resume: Resume | None = None
    if base.resume is not None and base.resume.whole_passes:
        again = base.resume.node
        resume = Resume(lambda loader, n: epochs_node(again(loader, n), max(0, count - loader.passes)), False)
    if length is None:
        return base._replace(open=open, chunks=None, resume=resume)
    by_index = None if base.by_index is None else functools.partial(_across_passes, base.by_index, count, length)
    chunks = chain_chunks(base.chunks, count, length) if base.seekable else None
    return Node(open, count * length, base.seekable, by_index, chunks, resume)


def pass_node(base: Node, e: int) -> Node:
    """Pass ``e`` alone."""
    get = base.by_index
    by_index = None if get is None else lambda epoch: get(e)
    opened = lambda epoch, start: base.open(e, start)
    return base._replace(open=opened, by_index=by_index, chunks=pass_chunks(base.chunks, e), resume=None)


def skip_node(base: Node, count: int) -> Node:
    """The items after the first ``count``."""
    return base._replace(
        open=lambda epoch, start: base.open(epoch, start + count),
        length=None if base.length is None else max(0, base.length - count),
        by_index=_by_index_of(base, lambda get: lambda i: get(i + count)),
        chunks=skip_chunks(base.chunks, count),
        resume=None,
    )


def take_node(base: Node, count: int) -> Node:
    """The first ``count`` items."""
    return base._replace(
        open=lambda epoch, start: itertools.islice(base.open(epoch, start), max(0, count - start)),
        length=None if base.length is None else min(count, base.length),
        chunks=take_chunks(base.chunks, count),
        resume=_resume_of(base, lambda node, n: take_node(node, max(0, count - n)), whole_passes=False),
    )


def prefetch_node(base: Node, count: int) -> Node:
    """The same items, made by a thread that stays up to ``count`` items ahead."""
    ahead = lambda epoch, start: prefetched(functools.partial(base.open, epoch, start), count)
    return base._replace(open=ahead, by_index=None, chunks=None, resume=None)


def _by_index_of(base: Node, wrap: Callable[[GetItem], GetItem]) -> Callable[[int], GetItem] | None:
    """The ``by_index`` of a stage that makes its items of those of the same pass of ``base``."""
    by_index = base.by_index
    return None if by_index is None else lambda epoch: wrap(by_index(epoch))


def _resume_of(
    base: Node, wrap: Callable[[Node, int], Node], *, size: int = 1, whole_passes: bool = True
) -> Resume | None:
    """The ``resume`` of a stage.

    Args:
        base: the stage before.
        wrap: ``wrap(rest, n)`` is the rest of the stage after ``n`` of its items, made of the rest of ``base``.
        size: how many items of ``base`` make one of the stage.
        whole_passes: False where the stage ends before a pass of ``base`` does.
    """
    if base.resume is None:
        return None
    again, whole = base.resume
    return Resume(lambda loader, n: wrap(again(loader, n * size), n), whole and whole_passes)


def _across_passes(by_index: Callable[[int], GetItem], count: int, length: int, epoch: int) -> GetItem:
    # All passes stay open, each with its order, because a shuffle of them jumps between them.
    view = functools.cache(lambda e: by_index(epoch * count + e))

    def get(i: int) -> Any:
        e, j = divmod(i, length)
        return view(e)(j)

    return get


# Exceptions


def noting_where(f: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """``f`` called with (index, item), or with the index alone by a source; its exceptions name stage and item."""

    def call(i: int, *item: Any) -> Any:
        try:
            return f(*item) if item else f(i)
        except Exception as error:
            _note_where(error, stage, i)
            raise

    return call


def _note_where(error: Exception, stage: str, i: int) -> None:
    """Add the stage and the item to an exception of a user's function; the caller raises it again."""
    if isinstance(error, StopIteration):
        raise RuntimeError(
            f"StopIteration in {stage}, item {i}: it would silently end the pipeline at this item. An iterator in "
            "your function has no item left: call next(iterator, default), or use an iterator with enough items."
        ) from error
    error.add_note(f"In the data pipeline's {stage}, item {i} (counted from 0).")
