"""The classes whose instances are values: a copy is the same object, and what a value does not do is refused."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn, TypeVar

from kaun._calls.names import advice, no_attribute
from kaun._calls.refusal import explained
from kaun._calls.texts import CALLS

__all__ = ["frozen", "with_advice"]

C = TypeVar("C", bound=type)


def frozen(cls: C) -> C:
    """Decorate a frozen dataclass: it refuses changes and pickling, and is its own copy; then as ``with_advice``."""

    def changed(self: Any, name: str, *_: Any) -> NoReturn:
        raise AttributeError(f"{cls.__name__} is immutable: {advice(cls.__name__, '=').format(name=name)}")

    def reduced(self: Any) -> NoReturn:
        raise TypeError(advice(cls.__name__, "pickle"))

    same: dict[str, Any] = {"__copy__": lambda self: self, "__deepcopy__": lambda self, _: self}
    refused = {"__setattr__": changed, "__delattr__": changed, "__reduce__": reduced}
    for name, method in {**same, **refused}.items():
        setattr(cls, name, method)
    return with_advice(cls)


def with_advice(cls: C) -> C:
    """Decorate a class: making it and its methods explain wrong calls, and it wrong attributes and being called."""

    def missing(self: Any, name: str) -> NoReturn:
        raise no_attribute(f"{cls.__name__!r} object", cls.__name__, name, cls)

    def call(self: Any, _: Any = None, /, **__: Any) -> NoReturn:
        raise TypeError(f"{cls.__name__!r} object is not callable. {advice(cls.__name__, '()')}")

    for name in ["__init__", *dir(cls)]:
        entry = cls.__name__ if name == "__init__" else f"{cls.__name__}.{name}"
        if entry in CALLS:
            method: Any = inspect.getattr_static(cls, name)
            of_class = isinstance(method, classmethod)
            decorated = explained(entry)(method.__func__ if of_class else method)
            setattr(cls, name, classmethod(decorated) if of_class else decorated)
    cls.__getattr__ = missing
    if advice(cls.__name__, "()"):
        cls.__call__ = call
    return cls
