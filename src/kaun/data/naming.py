"""Exceptions of a user's function in a pipeline, which name the stage and the item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kaun._messages import add_note

__all__ = ["note_where", "noting_where"]


def noting_where(f: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """``f`` as a function of (index, item), for a source of the index; its exceptions name the stage and the item."""

    def call(i: int, *item: Any) -> Any:
        try:
            return f(*item) if item else f(i)
        except Exception as error:
            note_where(error, stage, i)
            raise

    return call


def note_where(error: Exception, stage: str, i: int) -> None:
    """Add the stage and the item to an exception of a user's function; the caller raises it again."""
    if isinstance(error, StopIteration):
        raise RuntimeError(
            f"StopIteration in {stage}, item {i}: it would silently end the pipeline at this item. An iterator in "
            "your function has no item left: call next(iterator, default), or use an iterator with enough items."
        ) from error
    add_note(error, f"In the data pipeline's {stage}, item {i} (counted from 0).")
