"""The stages of a ``Data`` pipeline: what runs when one is iterated. Nothing here knows ``Data``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

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
)  # fmt: skip
from kaun.data.collate import ArrayRows
from kaun.data.loaders import known_length, open_loader
from kaun.data.naming import note_where, noting_where
from kaun.data.pieces import RowBlocks
from kaun.data.prefetch import prefetched, snapshot_item
from kaun.data.resumable import SKIPPED, ResumableLoader
from kaun.data.rows import Padding, over_items
from kaun.data.shuffle import item_keys

GetItem = Callable[[int], Any]
"""The function from index to item of one pass."""

SAME_ITEMS = frozenset(["Data.assemble", "Data.local", "Data.prefetch"])
"""The stages whose items are those before them, elsewhere."""


class Node(NamedTuple):
    """What a stage does. Passes (epochs) and items count from 0; only orders, keys and loaders depend on the pass.

    The pass is None outside of ``epochs`` and ``epoch``. It is pass 0 then, and a loader keeps an epoch that its user
    has set.

    Attributes:
        open: ``open(epoch, start)`` iterates one pass from its item ``start`` on.
        length: The number of items of a pass, None if it is not known.
        seekable: Whether ``start`` costs nothing and ``length`` is exact (what a loader says of its length may be
            wrong).
        by_index: ``by_index(epoch)`` is the function from index to item that a shuffle needs, None for a stream.
        chunks: Iterates a pass several items at a time, see ``chunks.Chunks``; None if that gains nothing.
        resume: How the stage is opened again from a position of its loader, None if that is not known.
        takes_first: Whether ``open`` has a third argument, a function that it calls with its first item.
        rows: What is known of the rows of its items, which may be of the class ``rows.RowsItem`` then: ``"where"`` if
            some are filled, ``"weights"`` if they have weights.
        padding: How much of a pass of the stage that fills rows is filled; None where that is not known.
        narrow: ``narrow(blocks)`` is the stage whose items have the rows of these blocks alone, and which reads no
            others; None where its items are not batches of rows that are read by index.
    """

    open: Callable[..., Iterator[Any]]
    length: int | None
    seekable: bool
    by_index: Callable[[int | None], GetItem] | None
    chunks: Chunks | None = None
    resume: Resume | None = None
    takes_first: bool = False
    rows: frozenset[str] = frozenset()
    padding: Padding | None = None
    narrow: Callable[[RowBlocks], Node] | None = None


class Resume(NamedTuple):
    """How a stage over a loader is opened again after some of its items, at the position of the loader.

    Attributes:
        node: ``node(loader, n)`` is the stage over a loader that is where it was after ``n`` items of the stage, in its
            pass number ``loader.passes``.
        start: ``start(loader, n)`` is where that node has to be opened: the items of the pass before that position.
        whole_passes: Whether each pass of the stage is a whole pass of the loader.
    """

    node: Callable[[ResumableLoader, int], Node]
    start: Callable[[ResumableLoader, int], int]
    whole_passes: bool


class StageSpec(NamedTuple):
    """One stage as the user wrote it.

    Attributes:
        text: As the pipeline prints it.
        given: Its parameters by name; arrays, functions and keys as they are.
        length: The number of items of a pass after it, None if it is not known.
    """

    text: str
    given: Mapping[str, Any]
    length: int | None

    @property
    def name(self) -> str:
        """The method of Data, ``"Data.map"``."""
        return "Data." + self.text.partition("(")[0].removeprefix("Data").removeprefix(".")

    @property
    def sources(self) -> Sequence[Sequence[StageSpec]]:
        """The stages of each pipeline that a stage of several puts together; of any other there are none."""
        return self.given.get("sources", ())


def every_stage(stages: Sequence[StageSpec]) -> Iterator[StageSpec]:
    """The stages of a pipeline, and before a stage over several pipelines those of each."""
    for stage in stages:
        for inner in stage.sources:
            yield from every_stage(inner)
        yield stage


# Sources


def index_node(n: int, by_index: Callable[[int | None], GetItem]) -> Node:
    """``n`` items, each made of its index."""
    return Node(lambda epoch, start: map(by_index(epoch), range(start, n)), n, True, by_index)


def items_node(items: Any, stage: str) -> Node:
    """The items of a sequence."""
    get = items.__getitem__ if type(items) in (tuple, range) else noting_where(items.__getitem__, stage)
    return index_node(len(items), lambda epoch: get)


def function_node(n: int, f: Callable[[int], Any], stage: str) -> Node:
    """The items ``f(0)`` to ``f(n - 1)``."""
    get = noting_where(f, stage)
    return index_node(n, lambda epoch: get)


def repeat_node(n: int, item: Any) -> Node:
    """The same item ``n`` times."""
    opened = lambda epoch, start: itertools.repeat(item, n - start)
    return Node(opened, n, True, lambda epoch: lambda i: item, item_chunks(item, n))


def batches_node(
    rows: ArrayRows, size: int, drop_last: bool, order: Callable[[int | None], Any], n: int | None = None
) -> Node:
    """The batches of arrays in memory.

    Args:
        rows: The arrays.
        size: Rows of a batch.
        drop_last: Whether a last batch that is smaller is left out.
        order: The order of the rows in a pass, None for their own.
        n: How many rows the order has, all of them where it is None.
    """
    n = rows.length if n is None else n
    length = group_count(n, size, drop_last)

    def by_index(epoch: int | None) -> GetItem:
        index = order(epoch)
        return lambda i: rows.take(batch_index(index, i, size, n))

    opened = lambda epoch, start: rows.batches(order(epoch), size, start, length)
    return Node(opened, length, True, by_index, row_chunks(rows.leaves, rows.take, order, size, n, length))


def loader_node(source: Any, stage: str) -> Node:
    """The items of a loader, or of the loader that a function makes in each pass."""
    length = known_length(source)
    again = Resume(lambda loader, n: loader_node(loader, stage), lambda loader, n: loader.taken, True)
    by_items = isinstance(source, (list, tuple, range))  # the position in them is a number of items
    return Node(open_loader(source, stage), length, False, None, resume=None if by_items else again)


# Stages


def map_node(
    base: Node, f: Callable[[Any], Any], stage: str, *, keeps_arrays: bool = False, takes_rows: bool = False
) -> Node:
    """The items ``f(item)``.

    Args:
        base: The stage before.
        f: The function.
        stage: The stage as the pipeline prints it, for messages.
        keeps_arrays: Whether ``f`` reads no array of an item, and passes all of them on.
        takes_rows: Whether ``f`` takes also what is known of the rows of an item.
    """
    f = over_items(f) if base.rows and not takes_rows else f
    call = noting_where(f, stage)

    def open(epoch: int | None, start: int, first: Callable[[Any], None] | None = None) -> Iterator[Any]:
        # One frame for each item, and not `call`: fit pulls an item for each step.
        i = start
        for item in base.open(epoch, start):
            try:
                made = f(item)
            except Exception as error:
                note_where(error, stage, i)
                raise
            if first is not None:
                first = first(made)
            yield made
            i += 1

    by_index = _by_index_of(base, lambda get: lambda i: call(i, get(i)))
    chunks = map_chunks(base.chunks, call) if keeps_arrays else None
    resume = _resume_of(base, lambda node: map_node(node, _but_skipped(f), stage))
    rows: frozenset[str] = frozenset() if takes_rows else base.rows
    return _over(base, open=open, by_index=by_index, chunks=chunks, resume=resume, takes_first=True, rows=rows)


def random_map_node(base: Node, f: Callable[[jax.Array, Any], Any], key: jax.Array, stage: str) -> Node:
    """The items ``f(key, item)``, with a key that is a function of ``key``, the pass and the index of the item."""
    call = noting_where(over_items(f) if base.rows else f, stage)

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        keys = item_keys(key, epoch)
        for i, item in enumerate(base.open(epoch, start), start):
            yield item if item is SKIPPED else call(i, keys(i), item)

    def by_index(epoch: int | None) -> GetItem:
        assert base.by_index is not None
        get, keys = base.by_index(epoch), item_keys(key, epoch)
        return lambda i: call(i, keys(i), get(i))

    resume = _resume_of(base, lambda node: random_map_node(node, f, key, stage))
    return _over(base, open=open, by_index=base.by_index and by_index, chunks=None, resume=resume)


def group_node(base: Node, size: int, f: Callable[[list[Any]], Any], drop_last: bool, stage: str) -> Node:
    """The items ``f`` of each list of ``size`` consecutive items."""
    call, total = noting_where(f, stage), base.length or 0

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        source = base.open(epoch, start * size)
        for i in itertools.count(start):
            group = [snapshot_item(item) for item in itertools.islice(source, size)]
            if len(group) == size or (group and not drop_last):
                yield SKIPPED if group[-1] is SKIPPED else call(i, group)
            if len(group) < size:
                return

    def indices(i: int) -> range:
        return range(i * size, min(i * size + size, total))

    by_index = _by_index_of(base, lambda get: lambda i: call(i, [snapshot_item(get(j)) for j in indices(i)]))
    length = None if base.length is None else group_count(base.length, size, drop_last)
    resume = _resume_of(base, lambda node: group_node(node, size, f, drop_last, stage), size=size)
    return Node(open, length, base.seekable, by_index, resume=resume)


def group_count(n: int, size: int, drop_last: bool) -> int:
    """How many groups of ``size`` there are in ``n`` items."""
    return n // size if drop_last else -(-n // size)


def shuffle_node(base: Node, n: int, order: Callable[[int | None], Any]) -> Node:
    """``n`` items of a stage that has items by index, in the order of the pass."""

    def shuffled(epoch: int | None) -> GetItem:
        assert base.by_index is not None
        get, rows = base.by_index(epoch), order(epoch)
        return lambda i: get(int(rows[i]))

    narrow = _narrow_of(base, lambda node: shuffle_node(node, n, order))
    return index_node(n, shuffled)._replace(rows=base.rows, padding=base.padding, narrow=narrow)


def epochs_node(base: Node, count: int, at: tuple[int, int, int] = (0, 0, 0)) -> Node:
    """``count`` passes, one after the other.

    Args:
        base: The stage before.
        count: How many passes there are.
        at: Where a loader that is resumed is: its pass, the items of ``base`` before it in that pass, and all items
            before it.
    """
    length = base.length
    resumed, within_pass, done = at

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        before = (epoch or 0) * count
        if not base.seekable or length is None:
            passes = (base.open(before + e, within_pass if e == resumed else 0) for e in range(resumed, count))
            return itertools.islice(itertools.chain.from_iterable(passes), start - done, None)
        if length == 0:
            return iter(())
        first, within = divmod(start, length)
        rest = (base.open(before + e, within if e == first else 0) for e in range(first, count))
        return itertools.chain.from_iterable(rest)

    resume: Resume | None = None
    if base.resume is not None and base.resume.whole_passes:
        again, start_of, _ = base.resume
        rest_of = lambda loader, n: epochs_node(again(loader, n), count, (loader.passes, start_of(loader, n), n))
        resume = Resume(rest_of, lambda loader, n: n, False)
    if length is None:
        return _over(base, open=open, chunks=None, resume=resume)
    by_index = None if base.by_index is None else functools.partial(_across_passes, base.by_index, count, length)
    chunks = chain_chunks(base.chunks, count, length) if base.seekable else None
    made = Node(open, count * length, base.seekable, by_index, chunks, resume, rows=base.rows, padding=base.padding)
    return made._replace(narrow=_narrow_of(base, lambda node: epochs_node(node, count)))


def pass_node(base: Node, e: int) -> Node:
    """Pass ``e`` alone."""
    get = base.by_index
    by_index = None if get is None else lambda epoch: get(e)
    opened = lambda epoch, start: base.open(e, start)
    chunks, narrow = pass_chunks(base.chunks, e), _narrow_of(base, lambda node: pass_node(node, e))
    return _over(base, open=opened, by_index=by_index, chunks=chunks, resume=None, narrow=narrow)


def skip_node(base: Node, count: int) -> Node:
    """The items after the first ``count``."""
    return _over(
        base,
        open=lambda epoch, start: base.open(epoch, start + count),
        length=None if base.length is None else max(0, base.length - count),
        by_index=_by_index_of(base, lambda get: lambda i: get(i + count)),
        chunks=skip_chunks(base.chunks, count),
        resume=None,
        narrow=_narrow_of(base, lambda node: skip_node(node, count)),
    )


def take_node(base: Node, count: int) -> Node:
    """The first ``count`` items."""
    return _over(
        base,
        open=lambda epoch, start: itertools.islice(base.open(epoch, start), max(0, count - start)),
        length=None if base.length is None else min(count, base.length),
        chunks=take_chunks(base.chunks, count),
        resume=_resume_of(base, lambda node: take_node(node, count), whole_passes=False),
        narrow=_narrow_of(base, lambda node: take_node(node, count)),
    )


def prefetch_node(base: Node, count: int) -> Node:
    """The same items, made by a thread that stays up to ``count`` items ahead."""
    ahead = lambda epoch, start: prefetched(functools.partial(base.open, epoch, start), count)
    narrow = _narrow_of(base, lambda node: prefetch_node(node, count))
    return _over(base, open=ahead, by_index=None, chunks=None, resume=None, narrow=narrow)


def _over(base: Node, *, takes_first: bool = False, narrow: Any = None, **fields: Any) -> Node:
    """A stage over another one, which has the fields that are not given."""
    return base._replace(takes_first=takes_first, narrow=narrow, **fields)


def _narrow_of(base: Node, wrap: Callable[[Node], Node]) -> Callable[[RowBlocks], Node] | None:
    """The ``narrow`` of a stage that passes on the items of ``base`` as they are."""
    narrow = base.narrow
    return None if narrow is None else lambda blocks: wrap(narrow(blocks))


def _by_index_of(base: Node, wrap: Callable[[GetItem], GetItem]) -> Callable[[int | None], GetItem] | None:
    """The ``by_index`` of a stage that makes its items of those of the same pass of ``base``."""
    by_index = base.by_index
    return None if by_index is None else lambda epoch: wrap(by_index(epoch))


def _resume_of(base: Node, wrap: Callable[[Node], Node], *, size: int = 1, whole_passes: bool = True) -> Resume | None:
    """The ``resume`` of a stage.

    Args:
        base: The stage before.
        wrap: The stage over another ``base``.
        size: How many items of ``base`` make one of the stage.
        whole_passes: False where the stage ends before a pass of ``base`` does.
    """
    if base.resume is None:
        return None
    again, start, whole = base.resume
    return Resume(
        lambda loader, n: wrap(again(loader, n * size)),
        lambda loader, n: -(-start(loader, n * size) // size),
        whole and whole_passes,
    )


def _but_skipped(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``f``, which is not called for an item that a resumed run skips."""
    return lambda item: item if item is SKIPPED else f(item)


def _across_passes(by_index: Callable[[int | None], GetItem], count: int, length: int, epoch: int | None) -> GetItem:
    # All passes stay open, each with its order, because a shuffle of them jumps between them.
    view = functools.cache(lambda e: by_index((epoch or 0) * count + e))

    def get(i: int) -> Any:
        e, j = divmod(i, length)
        return view(e)(j)

    return get
