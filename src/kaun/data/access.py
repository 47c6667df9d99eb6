"""What the other packages of kaun read of a ``Data``: its stages, its chunks, and how it is resumed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kaun.data.chunks import Chunk, Limit, one_by_one
from kaun.data.nodes import Node, Resume, StageSpec, every_stage
from kaun.data.pipeline import Data, make_data
from kaun.data.resumable import Check, ResumableLoader, after_skipped
from kaun.data.rows import loses_rows, own_rows

__all__ = [
    "chunks_of", "every_stage_of", "has_exact_length", "loaders_of", "makes_items", "over_loader",
    "refuse_lost_rows", "rest_of", "resume_of", "stages_of", "with_rows",
]  # fmt: skip


def stages_of(data: Any) -> tuple[StageSpec, ...]:
    """The stages of a pipeline, its source first; none of what is not a ``Data``."""
    return data._stages if isinstance(data, Data) else ()  # pyright: ignore[reportPrivateUsage]


def every_stage_of(data: Any) -> list[StageSpec]:
    """The stages of a pipeline and of the pipelines that it puts together; none of what is not a ``Data``."""
    return list(every_stage(stages_of(data)))


def loaders_of(data: Any) -> list[Any]:
    """The loaders under a pipeline, none for sources of kaun's own; any other data itself."""
    if not isinstance(data, Data):
        return [data]
    return [stage.given["source"] for stage in every_stage_of(data) if "source" in stage.given]


def chunks_of(data: Iterable[Any], iterator: Iterator[Any], limit: Limit) -> Iterator[Chunk]:
    """The items of ``data`` as ``fit`` takes them: several at a time where a pipeline can, else one by one.

    Args:
        data: What ``fit`` was given.
        iterator: An iterator over it.
        limit: How many items the next chunk may hold, see ``chunks.Limit``.

    Raises:
        TypeError: If some rows are filled or have weights, of which the items' losses do not know.
    """
    refuse_lost_rows(data)
    node = _node(data)
    return one_by_one(iterator) if node is None or node.chunks is None else node.chunks(None, 0, limit)


def refuse_lost_rows(data: Any) -> None:
    """Check that the losses of a pipeline's items know of filled rows and of weights.

    Raises:
        TypeError: If they do not.
    """
    node = _node(data)
    if node is not None and node.rows:
        raise loses_rows("fit of a pipeline whose items have no with_loss", node.rows)


def with_rows(data: Iterable[Any]) -> Iterable[Any]:
    """The same data, whose items are ``RowsItem`` where something is known of their rows.

    Raises:
        TypeError: If each process has rows of its own.
    """
    node = _node(data)
    if node is not None and "local" in node.rows:
        raise own_rows("evaluate or predict")
    return data if node is None or not node.rows else make_data(node._replace(rows=frozenset()), *stages_of(data))


def resume_of(data: Any) -> Resume | None:
    """How a pipeline is opened again from a position of its loader, None if that is not known."""
    node = _node(data)
    return None if node is None else node.resume


def has_exact_length(data: Any) -> bool:
    """Whether what data says of its length is true: a loader may say another number than it gives."""
    return all(isinstance(source, (list, tuple, range)) for source in loaders_of(data))


def makes_items(data: Any) -> bool:
    """Whether a loader or a function of the user makes the items: they may be others when they are made again."""
    stages = every_stage_of(data)
    sources = [*loaders_of(data), *(stage.given["items"] for stage in stages if "items" in stage.given)]
    if not all(isinstance(source, (list, tuple, range)) for source in sources):
        return True
    return any("f" in stage.given for stage in stages if stage.name != "Data.with_loss")


def over_loader(
    data: Data[Any], resume: Resume, loader: ResumableLoader, n: int, check: Check | None, *, positioned: bool
) -> Data[Any]:
    """The items of a pipeline after the first ``n``, taken from a loader.

    Args:
        data: The pipeline.
        resume: How it is opened again.
        loader: Its loader.
        n: How many items were taken.
        check: Called with the last of them, where it is made again.
        positioned: Whether the loader is where it was after them. Otherwise they are taken again.
    """
    node = resume.node(loader, n if positioned else 0)
    start = resume.start(loader, n if positioned else 0)

    def open(epoch: int | None, first: int) -> Iterator[Any]:
        opened = functools.partial(node.open, epoch, start)
        items = after_skipped(opened, n, loader, check) if n and not positioned else opened()
        yield from itertools.islice(items, first, None)

    return _rest(data, n, open, loader)


def rest_of(data: Data[Any], n: int, check: Check) -> Data[Any]:
    """The items of a pipeline after the first ``n``, of which the last is made again and given to ``check``."""
    node = _node(data.skip(n - 1))
    assert node is not None
    opened = node.open

    def open(epoch: int | None, first: int) -> Iterator[Any]:
        items = opened(epoch, 0)
        last = next(items, None)
        check(n - (last is None), last, True)
        del last
        yield from itertools.islice(items, first, None)

    return _rest(data, n, open, None)


def _rest(
    data: Data[Any], n: int, open: Callable[[int | None, int], Iterator[Any]], loader: ResumableLoader | None
) -> Data[Any]:
    first, *others = stages_of(data)
    node = _node(data)
    assert node is not None
    length = None if node.length is None else max(0, node.length - n)
    made = Node(open, length, False, None, rows=node.rows)
    return make_data(made, first if loader is None else first._replace(given={"source": loader}), *others)


def _node(data: Any) -> Node | None:
    return data._node if isinstance(data, Data) else None  # pyright: ignore[reportPrivateUsage]
