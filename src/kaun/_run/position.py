"""Where a run is in its data: the rest of the data after some items, and the position of a loader that has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from kaun._calls import has_items
from kaun.data import (
    Check,
    Data,
    ResumableLoader,
    checked_count,
    loaders_of,
    makes_items,
    over_loader,
    rest_of,
    resume_of,
    stages_of,
)

__all__ = ["makes_items", "position", "resume_from"]


def resume_from(
    data: Iterable[Any], n: int, position: Mapping[str, Any] | None = None, check: Check | None = None
) -> Iterable[Any]:
    """The data from its item ``n`` on, for one run: at no cost where it has items by index or a position is known.

    Args:
        data: A ``Data`` or any iterable, as ``fit`` takes it.
        n: How many items were taken.
        position: What ``position(data)`` returned then. Without one a stream pulls the items before ``n`` again.
        check: Called with the last of these items, where one is made again.

    Raises:
        TypeError: If data can be iterated once and has no ``get_state()`` and ``set_state(state)``, also where ``n`` is
            0: the run could not be resumed later.
        ValueError: If ``position(data)`` cannot have returned the position.

    Examples:
        >>> from kaun import Data
        >>> from kaun._run.position import resume_from
        >>> list(resume_from(Data.from_items([1, 2, 3]).epochs(2), 4))
        [2, 3]
    """
    n = checked_count("resume_from(data, n)", "n", n, 0)
    position = None if _is_split(data) else position
    source, resume = _source(data), resume_of(data)
    resumable = resume is not None or not isinstance(data, Data)
    for loader in loaders_of(data):
        if not hasattr(loader, "__next__") or (_has_state(loader) and resumable and (position or not n)):
            continue
        raise TypeError(
            f"A run with checkpoints expected data that can be iterated again, received {type(loader).__name__}, an "
            "iterator that can be iterated once: a resumed run could not continue where it stopped. Pass a list, "
            "list(iterator); a Data, Data.batches((x, y), batch_size=64); or a function that returns a new iterator, "
            "Data.from_iterable(lambda: make_iterator())."
        )
    if isinstance(data, (list, tuple)):
        return data[n:] if n else data
    if not isinstance(data, Data):
        return ResumableLoader(source, position, n, check) if has_items(data) else data
    if resume is None and n and check is not None and makes_items(data):
        return rest_of(data, n, check)
    if resume is None:
        return data.skip(n) if n else data
    return over_loader(data, resume, ResumableLoader(source, position), n, check, positioned=position is not None)


def position(data: Iterable[Any]) -> dict[str, Any] | None:
    """The position after the items taken of data that ``resume_from`` returned, as JSON; None if it is not known.

    It is known where the loader has one (``kaun.data.resumable.ResumableLoader``), and where each stage after it has a
    ``resume`` (``kaun.data.nodes.Resume``). Ask between two items.
    """
    source = _source(data)
    return source.position() if isinstance(source, ResumableLoader) and not _is_split(data) else None


def _source(data: Any) -> Any:
    """The loader of a pipeline, None for a source of kaun's own; any other data itself."""
    stages = stages_of(data)
    return stages[0].given.get("source") if stages else data


def _is_split(data: Any) -> bool:
    """Whether each process has a loader of its own: a checkpoint, which is written once, has no position of each."""
    return jax.process_count() > 1 and any(stage.name == "Data.assemble" for stage in stages_of(data))


def _has_state(iterator: Any) -> bool:
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")
