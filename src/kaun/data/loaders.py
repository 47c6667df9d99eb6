"""Items of loaders that are not kaun's own: opened anew in each pass, their tensors as arrays, their place known."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from kaun.data import convert

__all__ = ["ResumableLoader", "loader_length", "open_loader"]


def loader_length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # has none; torch's DataLoader has __len__ and raises this
        return None


def open_loader(source: Any, stage: str) -> Callable[[int, int], Iterator[Any]]:
    """The ``open`` of a node: a pass over a loader, or over what a function makes, from an item on."""
    once = [source] if hasattr(source, "__next__") else None
    had_items = False
    first: Any = None
    convert.refuse_forks(source, stage)

    def loader() -> Any:
        if once is None:
            return source if hasattr(source, "__iter__") else source()
        try:
            return once.pop()  # atomic: of two threads one gets it
        except IndexError:
            raise RuntimeError(
                f"{stage} is used up: an iterator can be iterated once. Pass a list, Data.from_items(list(iterator)), "
                "or a function that makes a fresh one, Data.from_iterable(lambda: make_iterator())."
            ) from None

    def open(epoch: int, start: int) -> Iterator[Any]:
        nonlocal had_items, first
        count = 0
        made = loader()
        if not hasattr(made, "__iter__"):
            raise TypeError(f"{stage} expected a function that returns an iterable, received {type(made).__name__}.")
        convert.refuse_forks(made, stage)
        try:
            # Not `yield from`, which would close the user's own generator together with this one.
            for item in made:
                had_items = True
                if count >= start:
                    found = convert.as_arrays(item)
                    first = first or _Structure(found)
                    first.check(found, stage)
                    yield found
                count += 1
        except Exception as error:
            error.add_note(f"In the data pipeline's {stage}, item {count} (counted from 0).")
            raise
        if had_items and not count:
            raise RuntimeError(
                f"{stage} came out empty, though it had items in an earlier pass: it hands out the same used-up "
                "iterator again. Pass a function that makes a fresh one, Data.from_iterable(lambda: make_iterator())."
            )

    return open


class _Structure:
    """The dicts, tuples and dataclasses of the first item, and their names. Lists may be of any length."""

    def __init__(self, item: Any) -> None:
        self._first = _outline(item)

    def check(self, item: Any, stage: str) -> None:
        if self._first is _HAS_LOSS or _fits(self._first, item):
            return
        now = _outline(item)
        if now != self._first and now is not _HAS_LOSS:
            raise TypeError(
                f"{stage} expected items of one structure, received another one than before: "
                f"{'; '.join(_changes('', self._first, now))}. Make them alike where they are made, "
                "Data.from_iterable(lambda: map(alike, loader))."
            )


_LEAF = ("leaf", None)
_LEAVES = frozenset([np.ndarray, bool, int, float, str, type(None), list])
_HAS_LOSS = ("loss", None)


def _outline(value: Any) -> tuple[str, Any]:
    kind = type(value)
    if kind is tuple and len(value) in (2, 3) and callable(value[1]):
        return _HAS_LOSS  # fit's own items: with a context or without, of any models
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


class ResumableLoader:
    """A loader, or a function that makes one, of which one run knows its place.

    An iterator whose ``get_state()`` gives JSON or bytes, and whose ``set_state`` takes them, is put back there at
    once; of any other ``n`` items are pulled first.

    Arguments:
        source: the loader or function.
        place: what ``place()`` of another one said.
        n: items that were taken.

    Attributes:
        source: the loader or function.
        passes: the pass that is under way, counted from 0.
    """

    source: Any
    passes: int

    def __init__(self, source: Any, place: Mapping[str, Any] | None = None, n: int = 0) -> None:
        self.source, self._n = source, n
        self.passes, self._state = (0, None) if place is None else _read(place)
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Any]:
        source, state, n = self.source, self._state, self._n
        makes = callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__")
        self.passes += self._iterator is not None
        made: Any = source() if makes else source
        convert.refuse_forks(made, f"data ({type(made).__name__})")
        self._iterator = iterator = iter(made)
        self._state, self._n = None, 0
        if state is not None:
            iterator.set_state(_decoded(state))
            n = 0
        # islice also of nothing: the user's own iterator is not closed with this one.
        return itertools.islice(iterator, n, None) if n or iterator is made else iterator

    def __len__(self) -> int:
        return max(0, len(self.source) - self._n)

    def place(self) -> dict[str, Any] | None:
        """Where the items taken so far end, as JSON; None where the iterator cannot tell, or none is taken."""
        get_state = getattr(self._iterator, "get_state", None)
        if get_state is None or not hasattr(self._iterator, "set_state"):
            return None
        state = _encoded(get_state())
        return None if state is None else {"pass": self.passes, "state": state}


def _encoded(state: Any) -> dict[str, Any] | None:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    try:
        return {"json": json.loads(json.dumps(state, allow_nan=False))}
    except (TypeError, ValueError):
        return None


def _decoded(state: Mapping[str, Any]) -> Any:
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]


def _read(place: Any) -> tuple[int, Mapping[str, Any]]:
    match place:
        case {"pass": int() as passes, "state": {"json": _} | {"base64": str()} as state} if passes >= 0:
            return passes, state
        case _:
            raise ValueError(
                f"a place in data is what position.position gave, received {place!r}. The checkpoint is of another "
                "version, or damaged."
            )
