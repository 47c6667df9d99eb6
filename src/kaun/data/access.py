"""What the other packages of kaun read of a ``Data``: its stages, its chunks, and how it is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kaun.data.chunks import Chunk, Limit, one_by_one
from kaun.data.loaders import ResumableLoader
from kaun.data.nodes import Node, Resume, StageSpec
from kaun.data.pipeline import Data, make_data

__all__ = ["chunks_of", "over_loader", "resume_of", "stages_of"]


def stages_of(data: Any) -> tuple[StageSpec, ...]:
    """The stages of a pipeline, its source first; none of what is not a ``Data``."""
    return data._stages if isinstance(data, Data) else ()  # pyright: ignore[reportPrivateUsage]


def chunks_of(data: Iterable[Any], iterator: Iterator[Any], limit: Limit) -> Iterator[Chunk]:
    """The items of ``data`` as ``fit`` takes them: several at a time where a pipeline can, else one by one.

    Args:
        data: what ``fit`` was given.
        iterator: an iterator over it.
        limit: how many items the next chunk may hold, see ``chunks.Limit``.
    """
    node = _node(data)
    return one_by_one(iterator) if node is None or node.chunks is None else node.chunks(0, 0, limit)


def resume_of(data: Any) -> Resume | None:
    """How a pipeline is opened again from a position of its loader, None if that is not known."""
    node = _node(data)
    return None if node is None else node.resume


def over_loader(data: Data[Any], resume: Resume, loader: ResumableLoader, n: int) -> Data[Any]:
    """The items of a pipeline after the first ``n``, taken from a loader whose position is after them."""
    first, *rest = stages_of(data)
    return make_data(resume.node(loader, n), first._replace(given={"source": loader}), *rest)


def _node(data: Any) -> Node | None:
    return data._node if isinstance(data, Data) else None  # pyright: ignore[reportPrivateUsage]
