"""The classes whose instances are values: a copy is the same object, and what a value does not do is refused."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

from kaun._calls.names import advice, no_attribute
from kaun._calls.refusal import explained, is_explained
from kaun._calls.texts import CALLS
from kaun._messages import frames_hidden

__all__ = ["explained_methods", "frozen", "has_items", "refuse_items", "refuse_property", "with_advice"]

C = TypeVar("C", bound=type)


def frozen(cls: C) -> C:
    """Decorate a frozen dataclass: it refuses changes and pickling, and is its own copy; then as ``with_advice``."""

    @frames_hidden
    def reduced(self: Any) -> NoReturn:
        raise TypeError(advice(cls.__name__, "pickle"))

    same: dict[str, Any] = {"__copy__": lambda self: self, "__deepcopy__": lambda self, _: self}
    for name, method in {**same, "__reduce__": reduced}.items():
        setattr(cls, name, method)
    return with_advice(cls)


def refuse_property(self: Any, name: str) -> None:
    """Raise what a property raised, an AttributeError, for which Python calls ``__getattr__``."""
    if isinstance(held := getattr(type(self), name, None), property):
        held.__get__(self)


def explained_methods(cls: C) -> C:
    """Decorate a class as ``with_advice`` does; also, all its public methods explain wrong calls."""
    # A tree_ method is called by JAX, for each step.
    _explain(cls, ["__init__", *(name for name in dir(cls) if not name.startswith(("_", "tree_")))])
    return with_advice(cls)


def _explain(cls: type, names: Iterable[str]) -> None:
    """Decorate those methods of a class that kaun defines and that do not report wrong calls themselves."""
    for name in names:
        held: Any = inspect.getattr_static(cls, name)
        method = held.__func__ if isinstance(held, (classmethod, staticmethod)) else held
        if not isinstance(method, types.FunctionType) or not method.__module__.startswith("kaun."):
            continue
        if not is_explained(method):
            decorated = explained(_entry(cls, name))(inspect.unwrap(method))  # its decorators hide frames, as this one
            setattr(cls, name, decorated if method is held else type(held)(decorated))


def _entry(cls: type, name: str) -> str:
    """The name of a method in ``CALLS``: as users write the class, most of them with its module."""
    package = cls.__module__.split(".")[1]
    whole = f"{package}.{cls.__name__}" if package in ("checkpoint", "losses", "metrics", "reports") else cls.__name__
    return whole if name == "__init__" else f"{whole}.{name}"


def with_advice(cls: C) -> C:
    """Decorate a class: it explains wrong calls that have an entry in ``CALLS``, wrong attributes, and what it is not.

    That is a function, a container, or an object that changes, where there is an entry ``()``, ``[]`` or ``=``.
    """

    @frames_hidden
    def missing(self: Any, name: str) -> NoReturn:
        refuse_property(self, name)
        raise no_attribute(f"{cls.__name__!r} object", cls.__name__, name, cls)

    @frames_hidden
    def call(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{cls.__name__!r} object is not callable. {advice(cls.__name__, '()')}")

    @frames_hidden
    def changed(self: Any, name: str, *_: Any) -> NoReturn:
        text = advice(cls.__name__, "=").format(name=name)
        raise dataclasses.FrozenInstanceError(f"{cls.__name__} is immutable: {text}")

    # What takes functions finds that it takes no argument, and refuses it.
    call.__signature__ = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)])

    _explain(cls, [name for name in ["__init__", *dir(cls)] if _entry(cls, name) in CALLS])
    cls.__getattr__ = missing
    if advice(cls.__name__, "()"):
        cls.__call__ = call
    if advice(cls.__name__, "="):
        for method in ("__setattr__", "__delattr__"):
            setattr(cls, method, changed)
    return refuse_items(cls)


def refuse_items(cls: C) -> C:
    """Decorate a class that is not a container: an index, a loop and unpacking say what to write, if it is known."""

    @frames_hidden
    def item(self: Any, key: Any) -> NoReturn:
        text = advice(cls.__name__, "[str]" if isinstance(key, str) else "[]")
        raise TypeError(f"{cls.__name__!r} object has no items. {text or advice(cls.__name__, '[]')}")

    if advice(cls.__name__, "[]"):
        refusing: Any = item
        refusing.refuses = True  # read by has_items
        cls.__getitem__ = refusing  # a loop and unpacking call it too
    return cls


def has_items(value: Any) -> bool:
    """Whether a value can be iterated: by ``__iter__``, or by an index that ``refuse_items`` did not make."""
    by_index = getattr(type(value), "__getitem__", None)
    return hasattr(value, "__iter__") or (by_index is not None and not hasattr(by_index, "refuses"))
