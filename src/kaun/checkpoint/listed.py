"""Listed: the checkpoints of a directory that one run writes to, and which of them are kept."""

from __future__ import annotations

from pathlib import Path

from kaun.checkpoint.directory import Found

__all__ = ["Listed"]


class Listed:
    """The checkpoints of a directory as they were listed once, changed since by the one run that may write there.

    Args:
        found: The folders, the newest first.
        keep: How many steps keep a checkpoint, each its newest one.

    Attributes:
        old: The checkpoints that can be removed.
    """

    def __init__(self, found: list[Found], keep: int) -> None:
        self._keep = keep
        self._newest: dict[int, Found] = {}  # by step, in ascending order
        self.old: list[Found] = []
        for each in reversed(found):
            self.add(each)

    def next(self, path: Path, step: int) -> Found:
        """Where to put another checkpoint of a step."""
        same = [found.edition for found in (*self.old, *filter(None, [self._newest.get(step)])) if found.step == step]
        edition = 1 + max(same, default=-1)
        return Found(step, edition, path / (f"step-{step:08d}" + (f".{edition}" if edition else "")))

    def add(self, found: Found) -> None:
        """Note a checkpoint that is there now."""
        newest = self._newest
        if found.step in newest:
            self.old.append(newest[found.step])
        in_order = found.step in newest or not newest or found.step > next(reversed(newest))
        newest[found.step] = found
        if not in_order:
            self._newest = newest = dict(sorted(newest.items()))
        if len(newest) > self._keep:
            self.old.append(newest.pop(next(iter(newest))))
