"""The classes whose instances are values: a copy is the same object, and assignments and pickling are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

__all__ = ["frozen"]

C = TypeVar("C", bound=type)


def frozen(*, instead: str, unpicklable: str) -> Callable[[C], C]:
    """Return the decorator of a frozen dataclass for what a value answers when it is changed, copied or pickled.

    Args:
        instead: What to write in place of an assignment, with ``{name}`` for the attribute.
        unpicklable: Why it cannot be pickled, and what to pickle.
    """

    def changed(self: Any, name: str, *_: Any) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable: {instead.format(name=name)}")

    def reduced(self: Any) -> NoReturn:
        raise TypeError(unpicklable)

    def decorate(cls: C) -> C:
        same: dict[str, Any] = {"__copy__": lambda self: self, "__deepcopy__": lambda self, _: self}
        for name, method in {**same, "__setattr__": changed, "__delattr__": changed, "__reduce__": reduced}.items():
            setattr(cls, name, method)
        return cls

    return decorate
