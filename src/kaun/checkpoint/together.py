"""Checkpoints that several processes read together: each verifies a share of the parts, and all use one or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from kaun.checkpoint import one
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.folders import Found
from kaun.checkpoint.group import Group

__all__ = ["read_together", "try_together", "verify_together"]

T = TypeVar("T")


def verify_together(group: Group, disk: Disk, found: Found) -> str:
    """Verify a checkpoint, and return what is wrong with it; empty if nothing is."""
    return _wrong(group, lambda: one.verify(disk, found.path, found.step, group.index, group.count))[1]


def read_together(
    group: Group, disk: Disk, found: Found, like: Any, fault: Callable[[Any], str] = lambda state: ""
) -> tuple[list[one.Saved], str]:
    """Verify and read a checkpoint, and return it in a list, or an empty list and what is wrong with it.

    Args:
        group: The processes that read it.
        disk: The disk.
        found: The checkpoint.
        like: The template.
        fault: Says what is wrong with a state that was read; empty where nothing is.
    """

    def read(verified: bool) -> one.Saved:
        saved = one.read(disk, found.path, found.step, like, verified=verified)
        if wrong := fault(saved.state):
            raise one.Damaged(wrong)
        return saved

    return try_together(group, disk, found, read)


def try_together(group: Group, disk: Disk, found: Found, read: Callable[[bool], T]) -> tuple[list[T], str]:
    """What ``read`` returns, in a list, or an empty list and what is wrong with the checkpoint in any of the processes.

    Args:
        group: The processes.
        disk: The disk.
        found: The checkpoint.
        read: Reads it; called with whether all files were verified already.
    """
    if group.count > 1 and (wrong := verify_together(group, disk, found)):
        return [], wrong
    return _wrong(group, lambda: read(group.count > 1))


def _wrong(group: Group, act: Callable[[], T]) -> tuple[list[T], str]:
    made: list[T] = []

    def attempt() -> str:
        try:
            made.append(act())
        except one.Damaged as err:
            return str(err)
        return ""

    wrong = next(filter(None, group.gather(attempt)), "")
    return ([] if wrong else made), wrong
