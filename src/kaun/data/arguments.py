"""Arguments of the methods of ``Data``, checked: counts and functions."""

from __future__ import annotations

import operator
from typing import Any

from kaun._messages import locate

__all__ = ["checked_count", "function_text"]


def checked_count(where: str, name: str, value: Any, least: int) -> int:
    """A count as an int of at least ``least``.

    Raises:
        TypeError: when it is not an int.
        ValueError: when it is too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{where} expected an int for {name}, received {value!r}. Write {name}=int(...).")
    if number < least:
        raise ValueError(f"{where} expected {name} to be at least {least}, received {value!r}.")
    return number


def function_text(where: str, f: Any) -> str:
    """The name, file and line of a function.

    Raises:
        TypeError: when it is not callable.
    """
    if not callable(f):
        raise TypeError(f"{where} expected a function, received {f!r}. Pass the function itself, {where}(f), not f(x).")
    return locate(f).replace("`", "")
