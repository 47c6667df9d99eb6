"""The state or the variables of a checkpoint of a directory, chosen by name."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypeVar

from kaun._messages import warn
from kaun.checkpoint.best import Best
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.folders import Found, all_damaged, best_of, not_there, of_other_leaves, parse_name, scan
from kaun.checkpoint.group import Group
from kaun.checkpoint.together import try_together
from kaun.errors import ResumeMismatch

__all__ = ["load_from"]

T = TypeVar("T")
At = str | SupportsIndex


def load_from(where: str, path: Path, at: At, group: Group, read: Callable[[Disk, Found, bool], T]) -> T:
    """What ``read`` returns of a checkpoint.

    Args:
        where: The method that was called, for messages.
        path: The directory.
        at: ``"newest"``, ``"best"`` or a step.
        group: The processes that read it together.
        read: Reads a checkpoint, and verifies it unless it is called with True.

    Raises:
        TypeError, ValueError: If ``at`` is something else.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If all checkpoints are damaged, or the one asked for is; each is listed.
        ResumeMismatch: If it does not match the template.
    """
    disk, wanted = Disk(), _checked(where, at)
    bad: list[str] = []
    seen: set[str] = set()

    def choose() -> str | None:
        there = scan(disk, path)
        what = best_of(disk, path, there) if wanted == "best" else wanted
        step = what.step if isinstance(what, Best) else what
        todo = [found for found in there if found.path.name not in seen and step in (None, found.step)]
        if not (todo or bad):
            raise not_there(path, what, there)
        return todo[0].path.name if todo else None

    # Listed again after each attempt: a run may delete a checkpoint that was listed, and then there is a newer one.
    while name := group.first(choose):
        found = parse_name(path / name)
        assert found is not None
        seen.add(name)
        try:
            values, wrong = try_together(group, disk, found, functools.partial(read, disk, found))
        except ResumeMismatch as err:
            raise of_other_leaves(path, found, err) from None
        if not values:
            bad += [f"{name}: {wrong}"] if group.first(found.path.is_dir) else []
            continue
        if bad:
            listed = "\n  ".join(bad)
            warn(f"{str(path)!r}: loaded step {found.step}, because newer checkpoints are damaged:\n  {listed}")
        return values[0]
    raise all_damaged(path, bad)


def _checked(where: str, at: Any) -> int | Literal["best"] | None:
    """``at`` as a step, ``"best"``, or None for the newest."""
    if isinstance(at, str):
        if at not in ("newest", "best"):
            raise ValueError(
                f"Directory.{where}: at expected 'newest', 'best' or a step, received {at!r:.40}. Write at='best'."
            )
        return "best" if at == "best" else None
    try:
        if isinstance(at, bool):
            raise TypeError
        return operator.index(at)
    except TypeError:
        raise TypeError(
            f"Directory.{where}: at expected 'newest', 'best' or a step, received {at!r:.40}. Write at=1200."
        ) from None
