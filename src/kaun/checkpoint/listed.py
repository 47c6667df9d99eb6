"""Listed: the checkpoints of a directory that one run writes to, and which of them are kept."""

from __future__ import annotations

import bisect
from pathlib import Path

from kaun.checkpoint.best import Best
from kaun.checkpoint.folders import Found

__all__ = ["Listed"]


class Listed:
    """The checkpoints of a directory as they were listed once, changed since by the one run that may write there.

    Kept are the best step, multiples of ``forever``, and the newest ``keep`` of all other steps, each in its newest
    edition. A step that was saved only because it was the best one is not kept when another is better.

    Args:
        found: The folders, the newest first.
        keep: How many of the newest steps are kept.
        forever: Multiples of this step are kept; None: no others.
        best: The best step so far.

    Attributes:
        old: The checkpoints that can be removed.
    """

    def __init__(self, found: list[Found], keep: int, forever: int | None = None, best: Best | None = None) -> None:
        self._keep, self._forever, self._best = keep, forever, best
        self._kept: dict[int, Found] = {}  # by step
        self._counted: list[int] = []  # the steps that `keep` counts, in ascending order
        self.old: list[Found] = []
        for each in reversed(found):
            self.add(each, best)

    def next(self, path: Path, step: int) -> Found:
        """Where to put another checkpoint of a step."""
        same = [found.edition for found in (*self.old, *filter(None, [self._kept.get(step)])) if found.step == step]
        edition = 1 + max(same, default=-1)
        return Found(step, edition, path / (f"step-{step:08d}" + (f".{edition}" if edition else "")))

    def add(self, found: Found, best: Best | None = None) -> None:
        """Note a checkpoint that is there now, and the best step since then."""
        if found.step in self._kept:
            self.old.append(self._kept[found.step])
        self._kept[found.step] = found
        records = [record for record in (self._best, best) if record is not None]
        self._best = best
        for step in {found.step, *(step for record in records for step in (record.step, *record.extra))}:
            if step in self._kept:
                self._count(step)
        while len(self._counted) > self._keep:
            self._drop(self._counted.pop(0))

    def _count(self, step: int) -> None:
        """Let ``keep`` count a step or not, and drop one that was the best one and is kept for nothing else."""
        at = bisect.bisect_left(self._counted, step)
        is_counted = self._counted[at : at + 1] == [step]
        is_best = self._best is not None and step == self._best.step
        is_extra = self._best is not None and step in self._best.extra
        if is_best or is_extra:
            if is_counted:
                del self._counted[at]
            if not is_best:
                self._drop(step)
        elif not is_counted:
            self._counted.insert(at, step)

    def _drop(self, step: int) -> None:
        if self._forever is None or step % self._forever:
            self.old.append(self._kept.pop(step))
