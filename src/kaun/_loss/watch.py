"""What a traced loss may not do to what it captures: write to it, or read it by names that are not in its code."""

from __future__ import annotations

import builtins
import collections
import enum
import functools
import importlib.util
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax

from kaun._jax import is_traced
from kaun._loss.code import code_info, function_in, function_reads, own_classes, slots_of
from kaun.errors import CaptureError

__all__ = ["UnforeseenError", "Watch", "containers_behind"]

_LEVELS = 3
_MOST_CONTAINERS = 100
CONTAINERS = (list, dict, set, collections.deque)
_NOT_LOOKED_INTO = (type, types.ModuleType, types.FunctionType, jax.Array)


class UnforeseenError(CaptureError):
    """A read of what could not be foreseen in the code: what it is, and the fix."""


class Watch:
    """A watch over what one callable was given.

    Args:
        names: Every attribute name in its code.

    Attributes:
        modules: Stand-ins for the modules that the code imports when it runs, by full name.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._before: list[tuple[Any, Any, bool]] = []  # a thing, its state, and whether only traced values count
        self._stand_ins: dict[int, tuple[Any, str]] = {}
        self._refused: dict[tuple[int, str], str] = {}
        self.modules: dict[str, types.ModuleType] = {}

    def add(self, *things: Any) -> None:
        """Watch lists, dicts, sets and deques, attributes of stand-ins, and classes, which are not copies."""
        self._before += [(thing, _state(thing), False) for thing in things]

    def add_foreign(self, value: Any) -> None:
        """Watch a module of a library, or what an object of one holds, for traced values. They are not copies."""
        if isinstance(value, types.ModuleType):
            self._before.append((value, _state(value), True))
        if not isinstance(value, _NOT_LOOKED_INTO):
            self._before += [(contents, _state(contents), True) for contents in _containers_in(value)]

    def stand_in(self, made: Any, kind: str) -> None:
        """Make known that of an object or class only what the code names was looked at."""
        self._stand_ins[id(made)] = (made, kind)

    def refuse(self, made: Any, name: str, reason: str) -> None:
        """Make known why an attribute of a stand-in is not there."""
        self._refused[id(made), name] = reason

    def include(self, other: Watch) -> None:
        """Watch over all that another one watches over."""
        self._before += other._before

    def restore(self) -> bool:
        """Put back what was written to. Return whether anything was."""
        wrote = False
        for thing, before, foreign in self._before:
            now = _state(thing)
            if not all(map(_same_items, now, before)) and (not foreign or any(map(is_traced, _values(*now)))):
                _put_back(thing, now, before)
                wrote = True
        return wrote

    def explain(self, error: AttributeError) -> str:
        """Why an attribute of a stand-in could not be read, "" where the object does not have it either."""
        name = error.name
        found = self._stand_ins.get(id(error.obj))
        if found is None or found[0] is not error.obj or not isinstance(name, str):
            return ""
        reason = self._refused.get((id(error.obj), name))
        if reason is not None:
            return f"reads `{name}` of a {found[1]}, {reason}"
        if name in self._names or (name.startswith("__") and name.endswith("__")):
            return ""
        return (
            f"reads `{name}` of a {found[1]} by a name that is computed when it runs, so the value could not be "
            f"read again for the next batch. Read it before the closure, {name} = config.{name}, and capture {name}."
        )

    def guards(self) -> dict[str, Callable[..., Any]]:
        """The built-in functions that could read what was not foreseen, with a check."""

        def checked(read: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(read)
            def guarded(obj: Any, name: str, *default: Any) -> Any:
                if id(obj) in self._stand_ins and (isinstance(obj, type) or not _holds(obj, name)):
                    reason = self.explain(AttributeError(name=name, obj=obj))
                    if reason:
                        raise UnforeseenError(reason)
                return read(obj, name, *default)

            return guarded

        def guarded_globals() -> dict[str, Any]:
            raise UnforeseenError(
                "calls `globals()`, and reads variables by names that are computed when it runs. Read them before the "
                "closure, weight = globals()[name], and capture weight."
            )

        def guarded_import(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            module = builtins.__import__(name, globals, locals, fromlist, level)
            full = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
            return self.modules.get(full if fromlist else full.partition(".")[0], module)

        return {
            "getattr": checked(getattr), "hasattr": checked(hasattr), "globals": guarded_globals,
            "__import__": guarded_import,
        }  # fmt: skip


def _holds(obj: Any, name: str) -> bool:
    slots = {} if isinstance(obj, types.ModuleType) else slots_of(type(obj))
    return name in getattr(obj, "__dict__", ()) or (name in slots and hasattr(obj, name))


# The state of a thing: its items, and its attributes


def _state(thing: Any) -> tuple[Any, dict[str, Any]]:
    base = next((base for base in CONTAINERS if isinstance(thing, base)), None)
    items = cast("Any", base).copy(thing) if base else ()
    return items, {} if type(thing) is base else _attributes(thing)


def _attributes(thing: Any) -> dict[str, Any]:
    held: dict[str, Any] = dict(getattr(thing, "__dict__", {}))
    if isinstance(thing, type):
        return {n: v for n, v in held.items() if not n.startswith("__")}
    cached = {n for base in type(thing).__mro__ for n, e in vars(base).items() if type(e) is functools.cached_property}
    slots = {n: getattr(thing, n) for n in slots_of(type(thing)) if hasattr(thing, n)}
    return slots | {n: v for n, v in held.items() if n not in cached}


def _put_back(thing: Any, now: tuple[Any, dict[str, Any]], before: tuple[Any, dict[str, Any]]) -> None:
    kind: Any = type if isinstance(thing, type) else object
    for name in now[1].keys() - before[1].keys():
        kind.__delattr__(thing, name)
    for name, value in before[1].items():
        if now[1].get(name, thing) is not value:
            kind.__setattr__(thing, name, value)
    if isinstance(thing, CONTAINERS):
        thing.clear()
        thing.extend(before[0]) if isinstance(thing, (list, collections.deque)) else thing.update(before[0])


def _same_items(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(k in now and now[k] is v for k, v in before.items())
    if isinstance(now, set):
        return now == before
    return all(a is b for a, b in zip(now, before, strict=True))


def _values(items: Any, attributes: dict[str, Any]) -> Iterator[Any]:
    for value in (*(items.values() if isinstance(items, dict) else items), *attributes.values()):
        yield value
        if isinstance(value, (list, tuple)):
            yield from cast("list[Any]", value)


def _containers_in(value: Any) -> Iterator[Any]:
    """The lists, dicts and sets through which an object keeps what it is given, a few levels deep."""
    level, seen = [value], set[int]()
    for _ in range(_LEVELS):
        inside: list[Any] = []
        for obj in level:
            contents = obj if isinstance(obj, CONTAINERS) else getattr(obj, "__dict__", None)
            if not isinstance(contents, CONTAINERS) or id(contents) in seen or len(seen) > _MOST_CONTAINERS:
                continue
            seen.add(id(contents))
            yield contents
            inside += list(contents.values() if isinstance(contents, dict) else contents)[:_MOST_CONTAINERS]
        level = [v for v in inside if not isinstance(v, _NOT_LOOKED_INTO)]


def containers_behind(kind: type, names: frozenset[str]) -> list[Any]:
    """The containers that code of a user's class may write to where they are, not in a copy.

    They are attributes of the class, and what its methods with these names capture, and the functions that those call.
    Code of other packages than that of the class may write.
    """
    own = (kind.__module__.partition(".")[0], "", "__main__")
    bases = [base for base in own_classes(kind) if base.__module__.partition(".")[0] in own]
    entries = [entry for base in bases for entry in vars(base).items()]
    found = [] if issubclass(kind, enum.Enum) else [e for n, e in entries if not n.startswith("__")]
    called = [function_in(e)[0] for n, e in entries if n in names or n.startswith("__")]
    seen: dict[int, Any] = {}
    while called:
        function = called.pop()
        if isinstance(function, types.FunctionType) and id(function) not in seen and code_info(function).root in own:
            seen[id(function)] = function
            values = [value for part in function_reads(function) for _, value in part]
            found += values
            called += values
    return [value for value in found if isinstance(value, CONTAINERS)]
