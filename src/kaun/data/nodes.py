"""The stages of a ``Data`` pipeline: what runs when one is iterated. Nothing here knows ``Data``."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from kaun._messages import locate
from kaun.data.chunks import Chunks, chained, mapped, skipped, taken, within
from kaun.data.collate import outline_of
from kaun.data.prefetch import snapshot_item

Item = Callable[[int], Any]


class Node(NamedTuple):
    """What a pipeline does. Passes (epochs) and items count from 0; only a shuffle looks at the pass.

    open: ``open(epoch, start)`` iterates one pass from its item ``start`` on.
    length: the number of items of a pass, None where it is not known.
    seekable: ``start`` costs nothing and ``length`` is exact (what a foreign loader says of its length may be wrong).
    item: ``item(epoch)`` is the function from index to item that a shuffle needs, None for a stream.
    runs: iterates a pass several items at a time, see ``kaun.runs``; None where that gains nothing.
    """

    open: Callable[[int, int], Iterator[Any]]
    length: int | None
    seekable: bool
    item: Callable[[int], Item] | None
    runs: Chunks | None = None


class StageSpec(NamedTuple):
    """One stage as it was asked for.

    text: as the pipeline prints it.
    given: its parameters by name; arrays, functions and keys as they are (``kaun.fingerprint`` looks at them).
    length: the number of items of a pass after it, None where it is not known.
    """

    text: str
    given: Mapping[str, Any]
    length: int | None

    @property
    def name(self) -> str:
        """The method of Data, ``"Data.map"``."""
        return "Data." + self.text.partition("(")[0].removeprefix("Data").removeprefix(".")


def indexed_by(n: int, item: Callable[[int], Item]) -> Node:
    return Node(lambda epoch, start: map(item(epoch), range(start, n)), n, True, item)


def item_of(base: Node, wrap: Callable[[Item], Item]) -> Callable[[int], Item] | None:
    """The ``item`` of a stage that makes its items of those of the same pass of ``base``."""
    item = base.item
    return None if item is None else lambda epoch: wrap(item(epoch))


def mapped_by(base: Node, f: Callable[[Any], Any], stage: str, *, keeps_arrays: bool = False) -> Node:
    """``keeps_arrays`` says that ``f`` looks at no array of an item, and hands all on."""
    call = noting_where(f, stage)

    def open(epoch: int, start: int) -> Iterator[Any]:
        return map(call, itertools.count(start), base.open(epoch, start))

    item = item_of(base, lambda get: lambda i: call(i, get(i)))
    return base._replace(open=open, item=item, runs=mapped(base.runs, call) if keeps_arrays else None)


def grouped_by(base: Node, n: int, f: Callable[[list[Any]], Any], drop_last: bool, stage: str) -> Node:
    call, total = noting_where(f, stage), base.length or 0

    def open(epoch: int, start: int) -> Iterator[Any]:
        source = base.open(epoch, start * n)
        for i in itertools.count(start):
            group = [snapshot_item(item) for item in itertools.islice(source, n)]
            if len(group) == n or (group and not drop_last):
                yield call(i, group)
            if len(group) < n:
                return

    def indices(i: int) -> range:
        return range(i * n, min(i * n + n, total))

    item = item_of(base, lambda get: lambda i: call(i, [snapshot_item(get(j)) for j in indices(i)]))
    return Node(open, None if base.length is None else group_count(base.length, n, drop_last), base.seekable, item)


def group_count(n: int, size: int, drop_last: bool) -> int:
    return n // size if drop_last else -(-n // size)


def over_passes(base: Node, n: int) -> Node:
    length = base.length

    def open(epoch: int, start: int) -> Iterator[Any]:
        if not base.seekable or length is None:
            whole = (base.open(epoch * n + e, 0) for e in range(n))
            return itertools.islice(itertools.chain.from_iterable(whole), start, None)
        if length == 0:
            return iter(())
        first, within = divmod(start, length)
        rest = (base.open(epoch * n + e, within if e == first else 0) for e in range(first, n))
        return itertools.chain.from_iterable(rest)

    if length is None:
        return base._replace(open=open, runs=None)
    item = None if base.item is None else functools.partial(_across_passes, base.item, n, length)
    return Node(open, n * length, base.seekable, item, chained(base.runs, n, length) if base.seekable else None)


def pass_of(base: Node, e: int) -> Node:
    get = base.item
    item = None if get is None else lambda epoch: get(e)
    return base._replace(open=lambda epoch, start: base.open(e, start), item=item, runs=within(base.runs, e))


def after_first(base: Node, n: int) -> Node:
    return base._replace(
        open=lambda epoch, start: base.open(epoch, start + n),
        length=None if base.length is None else max(0, base.length - n),
        item=item_of(base, lambda get: lambda i: get(i + n)),
        runs=skipped(base.runs, n),
    )


def first_of(base: Node, n: int) -> Node:
    return base._replace(
        open=lambda epoch, start: itertools.islice(base.open(epoch, start), max(0, n - start)),
        length=None if base.length is None else min(n, base.length),
        runs=taken(base.runs, n),
    )


def _across_passes(item: Callable[[int], Item], n: int, length: int, epoch: int) -> Item:
    # All passes stay open, each with its order, because a shuffle of them jumps between them.
    view = functools.cache(lambda e: item(epoch * n + e))

    def get(i: int) -> Any:
        e, j = divmod(i, length)
        return view(e)(j)

    return get


def noting_where(f: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """``f`` called with (index, item), or with the index alone by a source; its exceptions say in which stage."""

    def call(i: int, *item: Any) -> Any:
        try:
            return f(*item) if item else f(i)
        except StopIteration as error:
            raise RuntimeError(
                f"StopIteration in {stage}, item {i}: it would end the pipeline there, without a word. A "
                "next(iterator) in your function ran out; use next(iterator, default), or give it as many items."
            ) from error
        except Exception as error:
            error.add_note(f"In the data pipeline's {stage}, item {i} (counted from 0).")
            raise

    return call


def loss_of(f: Callable[[Any, Any], Any], item: Any) -> Any:
    if not (isinstance(item, (tuple, list)) and len(item) in (2, 3)):
        raise TypeError(
            f"with_loss expected items (x, y) or (x, y, Context(...)), received {outline_of(item)}. Make them such "
            'first: data.map(lambda item: (item["x"], item["y"])).with_loss(f).'
        )
    x, y, *ctx = item
    if callable(y):
        raise TypeError(
            f"with_loss expected labels y in items (x, y), received the function {name_of('with_loss', y)}: these "
            "items have their loss already. Leave with_loss out."
        )
    if ctx and not isinstance(ctx[0], Mapping):
        raise TypeError(
            f"with_loss expected a Context as third of an item (x, y, ctx), received {outline_of(ctx[0])}. Name it, "
            "data.map(lambda b: (b[0], b[1], Context(weights=b[2]))), or make it part of y."
        )
    return x, _loss(f, y), *ctx


def _loss(f: Callable[[Any, Any], Any], y: Any) -> Callable[[Any], Any]:
    # A plain function with f and y in its cells: all batches share its code, so that it compiles once.
    def loss(output: Any) -> Any:
        return f(output, y)

    return loss


def checked_count(where: str, name: str, value: Any, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{where} expected an int for {name}, received {value!r}. Write {name}=int(...).")
    if number < least:
        raise ValueError(f"{where} expected {name} to be at least {least}, received {value!r}.")
    return number


def name_of(where: str, f: Any) -> str:
    if not callable(f):
        raise TypeError(f"{where} expected a function, received {f!r}. Pass the function itself, {where}(f), not f(x).")
    return locate(f).replace("`", "")
