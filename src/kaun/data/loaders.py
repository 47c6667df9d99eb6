"""Loaders of other libraries: opened again in each pass, and their items checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from kaun._calls import has_items
from kaun._messages import add_note, contextmanager
from kaun.data import convert, libraries
from kaun.data.items import Item
from kaun.data.resumable import SKIPPED, ResumableLoader
from kaun.data.rows import loses_rows

__all__ = ["known_length", "open_items", "open_loader", "opened_loaders"]


def known_length(data: Any) -> int | None:
    """The length of any data or loader, None if it has none."""
    try:
        return len(data)
    except TypeError:  # torch's DataLoader over a stream has __len__ and raises this
        return None


@contextmanager
def open_items(data: Iterable[Any], expected: str) -> Generator[Iterator[Any]]:
    """An iterator over the data, closed at the end if it was made here.

    Args:
        data: What the user gave.
        expected: The message where it cannot be iterated.

    Raises:
        TypeError: If it cannot be iterated.
        RuntimeError: If it would fork its workers.
    """
    libraries.refuse_forks(data, f"data ({type(data).__name__})")
    if not has_items(data):
        raise TypeError(expected)
    try:
        iterator = iter(data)
    except TypeError:
        raise TypeError(expected) from None
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None and iterator is not data:
            close()


class _OpenedLoaders:
    """How often a pipeline of this process has opened a loader, for whoever watches what is drawn then."""

    count = 0


opened_loaders: _OpenedLoaders = _OpenedLoaders()


def open_loader(source: Any, stage: str) -> Callable[[int | None, int], Iterator[Any]]:
    """The ``open`` of a node over a loader, or over a function that makes one.

    Args:
        source: The loader or function.
        stage: The stage as the pipeline prints it, for messages.
    """
    once = [source] if hasattr(source, "__next__") else None
    had_items = False
    first: Any = None
    libraries.refuse_forks(source, stage)

    def loader() -> Any:
        if once is None:
            return source if hasattr(source, "__iter__") else source()
        try:
            return once.pop()  # atomic: of two threads one gets it
        except IndexError:
            raise RuntimeError(
                f"{stage} is exhausted: an iterator can be iterated once. Pass a list, "
                "Data.from_items(list(iterator)), or a function that returns a new iterator, "
                "Data.from_iterable(lambda: make_iterator())."
            ) from None

    def open(epoch: int | None, start: int) -> Iterator[Any]:
        nonlocal had_items, first
        count = 0
        opened_loaders.count += 1
        made = loader()
        _check_loader(made, stage)
        if epoch is not None:
            libraries.set_epoch(made, epoch)
        try:
            items = iter(made)
            count = made.taken if isinstance(made, ResumableLoader) else 0
            for item in items:  # not `yield from`, which would close the user's own generator together with this one
                had_items = True
                if item is SKIPPED:
                    yield item
                elif count >= start:
                    found = convert.as_arrays(item)
                    first = first or _Structure(found)
                    first.check(found, stage)
                    yield found
                count += 1
        except Exception as error:
            add_note(error, f"In the data pipeline's {stage}, item {count} (counted from 0).")
            raise
        if had_items and not count:
            raise RuntimeError(
                f"{stage} has no items, although it had items in an earlier pass: it returns the same exhausted "
                "iterator. Pass a function that returns a new iterator, Data.from_iterable(lambda: make_iterator())."
            )

    return open


def _check_loader(made: Any, stage: str) -> None:
    """Refuse what a function returned in place of a loader."""
    if not hasattr(made, "__iter__"):
        raise TypeError(f"{stage} expected a function that returns an iterable, received {type(made).__name__}.")
    libraries.refuse_forks(made, stage)
    if rows := getattr(getattr(made, "_node", None), "rows", None):  # it is a Data
        raise loses_rows(stage, rows, "Use the pipeline itself, in place of a function that returns it")


class _Structure:
    """The dicts, tuples and dataclasses of the first item, and the names in them. Lists may be of any length."""

    def __init__(self, item: Any) -> None:
        self._first = _outline(item)

    def check(self, item: Any, stage: str) -> None:
        """Refuse an item of another structure than the first; items that have their loss are left alone."""
        if self._first is _HAS_LOSS or _fits(self._first, item):
            return
        now = _outline(item)
        if now != self._first and now is not _HAS_LOSS:
            raise TypeError(
                f"{stage} expected all items to have the same structure, received an item of another structure: "
                f"{'; '.join(_changes('', self._first, now))}. Convert the items in the loader, "
                "Data.from_iterable(lambda: map(convert, loader))."
            )


_LEAF = ("leaf", None)
_LEAVES = frozenset([np.ndarray, bool, int, float, str, type(None), list])
_HAS_LOSS = ("loss", None)


def _outline(value: Any) -> tuple[str, Any]:
    kind = type(value)
    if Item.is_training_item(value):
        return _HAS_LOSS  # with a context or without, of any models
    if isinstance(value, Mapping):
        return kind.__name__, {str(k): _outline(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, tuple):
        return kind.__name__, {str(i): _outline(v) for i, v in enumerate(cast("tuple[Any, ...]", value))}
    if dataclasses.is_dataclass(kind):
        return kind.__name__, {f.name: _outline(getattr(value, f.name, None)) for f in dataclasses.fields(value)}
    return _LEAF


def _fits(outline: tuple[str, Any], value: Any) -> bool:
    """Whether a value surely has an outline: this runs for every item."""
    kind, parts = type(value), outline[1]
    if kind is tuple:
        return outline[0] == "tuple" and len(parts) == len(value) and all(map(_fits, parts.values(), value))
    if kind is dict:
        same = outline[0] == "dict" and parts.keys() == value.keys()
        return same and all(_fits(parts[k], v) for k, v in value.items())
    return outline is _LEAF and kind in _LEAVES


def _changes(path: str, before: tuple[str, Any], now: tuple[str, Any]) -> Iterator[str]:
    """What differs between two outlines, each difference in words."""
    where = repr(path) if path else "an item"
    if before[0] != now[0]:
        yield f"{where} was a {before[0]}, is a {now[0]}"
        return
    old, new = before[1] or {}, now[1] or {}
    for name in dict.fromkeys([*old, *new]):
        inner = f"{path}.{name}" if path else name
        if name in old and name in new:
            yield from _changes(inner, old[name], new[name])
        else:
            yield f"{inner!r} {'is missing' if name in old else 'is new'}"
