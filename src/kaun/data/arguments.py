"""Arguments of the methods of ``Data``, checked: counts and functions."""

from __future__ import annotations

import operator
from typing import Any

from kaun._messages import locate

__all__ = ["checked_count", "function_text", "refuse_frame"]


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


def refuse_frame(where: str, value: Any) -> Any:
    """The value, unless it is a Series or DataFrame of pandas or its like, whose ``[i]`` finds a label or a column.

    Raises:
        TypeError: when it is one: it has the rows by number as ``iloc``.
    """
    if not (hasattr(value, "iloc") and hasattr(value, "loc")):
        return value
    fix = "Data.from_items(series.to_numpy())"
    if hasattr(value, "columns"):
        fix = (
            'Data.batches((frame[["a", "b"]].to_numpy(np.float32), frame["y"].to_numpy()), batch_size=64), or for rows '
            'as dicts Data.from_items(frame.to_dict("records"))'
        )
    raise TypeError(
        f"{where} expected items by their number, received a {type(value).__name__}, which finds labels and columns. "
        f"Write {fix}."
    )


def function_text(where: str, f: Any) -> str:
    """The name, file and line of a function.

    Raises:
        TypeError: when it is not callable.
    """
    if not callable(f):
        raise TypeError(f"{where} expected a function, received {f!r}. Pass the function itself, {where}(f), not f(x).")
    return locate(f).replace("`", "")
