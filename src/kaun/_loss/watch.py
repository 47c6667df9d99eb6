"""What a loss that is being traced may not do to what it captures: write to it, or read what nobody could foresee."""

from __future__ import annotations

import builtins
import collections
import functools
import importlib.util
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax

from kaun._jax import is_traced
from kaun._loss.origin import is_library_type
from kaun._loss.reads import containers_behind
from kaun.errors import CaptureError

__all__ = ["UnforeseenError", "Watch"]

_LEVELS = 3
_MOST_CONTAINERS = 100
_CONTAINERS = (list, dict, set, collections.deque)
_IN_THE_CLASS = ("__dict__", "__weakref__", "__doc__", "__module__")


class Watch:
    """A watch over what one callable was given.

    Args:
        names: every attribute name in its code.

    Attributes:
        modules: stand-ins for the modules that the code imports when it runs, by full name.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._contents: list[tuple[Any, Any]] = []
        self._foreign: list[tuple[Any, Any]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._stand_ins: dict[int, tuple[Any, str]] = {}
        self._refused: dict[tuple[int, str], str] = {}
        self.modules: dict[str, types.ModuleType] = {}

    def add(self, contents: Any) -> None:
        """Watch a list, dict, set or deque that was made for the callable."""
        self._contents.append((contents, contents.copy()))

    def add_object(self, made: Any) -> None:
        """Watch a stand-in: its attributes, and its items where it has some."""
        self._objects.append((made, _attributes(made)))
        for base in (list, dict, set):
            if isinstance(made, base):
                self._contents.append((made, cast("Any", base)(made)))

    def add_class(self, kind: type) -> None:
        """Watch a class of the user's and its bases, and what their code writes to, which are not copies."""
        for base in kind.__mro__:
            if not is_library_type(base):
                self._classes.append((base, dict(vars(base))))
        for contents in containers_behind(kind, self._names):
            self.add(contents)

    def add_foreign(self, value: Any) -> None:
        """Watch what an object of a library holds, which is not a copy, for traced values."""
        if not isinstance(value, (type, types.ModuleType, types.FunctionType)):
            for contents in _containers_in(value):
                self._foreign.append((contents, contents.copy()))

    def stand_in(self, made: Any, kind: str) -> None:
        """Make known that an object holds no more than what the code was seen to read."""
        self._stand_ins[id(made)] = (made, kind)

    def refuse(self, made: Any, name: str, reason: str) -> None:
        """Make known why an attribute of a stand-in is not there."""
        self._refused[id(made), name] = reason

    def include(self, other: Watch) -> None:
        """Watch over all that another one watches over."""
        for mine, more in ((self._contents, other._contents), (self._foreign, other._foreign)):
            mine.extend(more)
        self._classes += other._classes
        self._objects += other._objects

    def restore(self) -> bool:
        """Put back what was written to, and tell whether anything was."""
        wrote = [now for now, before in self._contents if not _same_items(now, before)]
        wrote += [made for made, before in self._objects if not _same_items(_attributes(made), before)]
        changed = False
        for now, before in self._contents:
            if not _same_items(now, before):
                _put_back(now, before)
        for made, before in self._objects:
            _put_back_attributes(made, before)
        for now, before in self._foreign:
            if not _same_items(now, before) and any(is_traced(v) for v in _values(now)):
                _put_back(now, before)
                changed = True
        for kind, before in self._classes:
            changed = _put_back_class(kind, before) or changed
        return changed or bool(wrote)

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

        def check(obj: Any, name: Any) -> None:
            if id(obj) in self._stand_ins and isinstance(name, str) and not _holds(obj, name):
                reason = self.explain(AttributeError(name=name, obj=obj))
                if reason:
                    raise UnforeseenError(reason)

        @functools.wraps(getattr)
        def guarded_getattr(obj: Any, name: str, *default: Any) -> Any:
            check(obj, name)
            return getattr(obj, name, *default)

        @functools.wraps(hasattr)
        def guarded_hasattr(obj: Any, name: str) -> bool:
            check(obj, name)
            return hasattr(obj, name)

        @functools.wraps(globals)
        def guarded_globals() -> dict[str, Any]:
            raise UnforeseenError(
                "calls `globals()`, and reads variables by names that are computed when it runs. Read them before the "
                "closure, weight = globals()[name], and capture weight."
            )

        @functools.wraps(builtins.__import__)
        def guarded_import(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            module = builtins.__import__(name, globals, locals, fromlist, level)
            full = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
            return self.modules.get(full if fromlist else full.partition(".")[0], module)

        return {
            "getattr": guarded_getattr, "hasattr": guarded_hasattr, "globals": guarded_globals,
            "__import__": guarded_import,
        }  # fmt: skip


class UnforeseenError(CaptureError):
    """A read of what could not be foreseen in the code: what it is, and the fix."""


def _holds(obj: Any, name: str) -> bool:
    return name in getattr(obj, "__dict__", ()) or (
        not isinstance(obj, types.ModuleType) and name in _slots(type(obj)) and hasattr(obj, name)
    )


def _slots(kind: type) -> set[str]:
    return {
        n for base in kind.__mro__ for n, entry in vars(base).items() if isinstance(entry, types.MemberDescriptorType)
    }


def _attributes(made: Any) -> dict[str, Any]:
    found = {n: getattr(made, n) for n in _slots(type(made)) if hasattr(made, n)}
    cached = {
        n for base in type(made).__mro__ for n, e in vars(base).items() if isinstance(e, functools.cached_property)
    }
    return found | {n: v for n, v in getattr(made, "__dict__", {}).items() if n not in cached}


def _put_back_attributes(made: Any, before: dict[str, Any]) -> None:
    for name in _attributes(made).keys() - before.keys():
        object.__delattr__(made, name)
    for name, value in before.items():
        if getattr(made, name, None) is not value:
            object.__setattr__(made, name, value)


def _put_back_class(kind: type, before: dict[str, Any]) -> bool:
    now = vars(kind)
    changed = [n for n in {*now, *before} if n not in _IN_THE_CLASS and now.get(n, now) is not before.get(n, before)]
    changed = [n for n in changed if not (n not in before and n.startswith("__"))]
    for name in changed:
        if name in before:
            setattr(kind, name, before[name])
        else:
            delattr(kind, name)
    return bool(changed)


def _put_back(now: Any, before: Any) -> None:
    now.clear()
    now.extend(before) if hasattr(now, "extend") else now.update(before)


def _same_items(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(k in now and now[k] is v for k, v in before.items())
    if isinstance(now, set):
        return now == before
    return all(a is b for a, b in zip(now, before, strict=True))


def _values(contents: Any) -> Iterator[Any]:
    for value in contents.values() if isinstance(contents, dict) else contents:
        yield value
        if isinstance(value, (list, tuple)):
            yield from cast("list[Any]", value)


def _containers_in(value: Any) -> Iterator[Any]:
    """The lists, dicts and sets through which an object keeps what it is given, a few levels deep."""
    level, seen, count = [value], set[int](), 0
    for _ in range(_LEVELS):
        inside: list[Any] = []
        for obj in level:
            contents = obj if isinstance(obj, _CONTAINERS) else getattr(obj, "__dict__", None)
            if not isinstance(contents, _CONTAINERS) or id(contents) in seen or count > _MOST_CONTAINERS:
                continue
            seen.add(id(contents))
            count += 1
            yield contents
            inside += list(contents.values() if isinstance(contents, dict) else contents)[:_MOST_CONTAINERS]
        level = [v for v in inside if not isinstance(v, (type, types.ModuleType, types.FunctionType, jax.Array))]
