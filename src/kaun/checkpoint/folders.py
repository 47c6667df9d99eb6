"""The folders of checkpoints in a directory, and the errors where one is missing, damaged or does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kaun.checkpoint import one
from kaun.checkpoint.best import Best
from kaun.checkpoint.disk import Disk
from kaun.errors import ResumeMismatch

__all__ = [
    "Found", "all_damaged", "best_of", "newest_facts", "not_there", "of_other_leaves", "parse_name", "scan",
    "with_another_optimizer",
]  # fmt: skip

_STEP = re.compile(r"step-([0-9]{8,18})(?:\.([0-9]{1,6}))?", re.ASCII)
_LISTED = 100


class Found(NamedTuple):
    """A folder with a checkpoint's name. Of two folders of one step, the one with the higher edition is newer."""

    step: int
    edition: int
    path: Path


def scan(disk: Disk, path: Path) -> list[Found]:
    """The folders with a checkpoint's name, the newest first; what is in them is not read."""
    try:
        entries = disk.entries(path)
    except FileNotFoundError:
        return []
    named = [parse_name(path / entry.name) for entry in entries if not entry.is_file]
    return sorted(filter(None, named), reverse=True)


def parse_name(path: Path) -> Found | None:
    """The step and edition in the last name of a path, None if it is not a checkpoint's name."""
    match = _STEP.fullmatch(path.name)
    return Found(int(match[1]), int(match[2] or 0), path) if match else None


def newest_facts(disk: Disk, there: Iterable[Found]) -> dict[str, object]:
    """The facts of the newest checkpoint whose manifest is undamaged; its other files are not read.

    Args:
        disk: The disk.
        there: The checkpoints, the newest first.

    Raises:
        ResumeMismatch: If a newer version of kaun wrote it.
    """
    for found in there:
        try:
            return one.read_manifest(disk, found.path, found.step).facts
        except one.Damaged:
            continue
    return {}


def best_of(disk: Disk, path: Path, there: Iterable[Found]) -> Best:
    """The best step of the run in a directory.

    Raises:
        FileNotFoundError: If none is recorded; the steps that are there are listed.
        ResumeMismatch: If a newer version of kaun wrote the newest checkpoint, or another program.
    """
    there = list(there)
    if not there:
        raise not_there(path, None, there)
    try:
        best = Best.of(newest_facts(disk, there))
    except ResumeMismatch:
        raise
    except ValueError as err:
        raise ResumeMismatch(f"{str(path)!r}: the newest checkpoint is intact, but {err}.") from None
    if best is None:
        raise FileNotFoundError(
            f"{str(path)!r} has no best checkpoint: its run had no Directory(best=...), or measured nothing yet. "
            f"{_those(there)}"
        )
    return best


def not_there(path: Path, what: int | Best | None, there: Iterable[Found]) -> FileNotFoundError:
    """The error where a checkpoint that was asked for is not there; ``what`` is None for the newest one."""
    there = list(there)
    if what is None or not there:
        return FileNotFoundError(
            f"there is no checkpoint in {str(path)!r}. Train with fit(..., checkpoints=...) first, or look for the "
            "right folder."
        )
    which = f"of the best {what}" if isinstance(what, Best) else f"of step {what}"
    return FileNotFoundError(f"there is no checkpoint {which} in {str(path)!r}. {_those(there)}")


def _those(there: Iterable[Found]) -> str:
    steps = sorted({found.step for found in there})
    if len(steps) <= _LISTED:
        return f"It has these steps: {steps}."
    return f"It has {len(steps)} steps, the newest of them: {steps[-_LISTED:]}."


def all_damaged(path: Path, bad: list[str]) -> ValueError:
    """The error when every checkpoint is damaged."""
    listed = "\n  ".join(bad)
    return ValueError(
        f"no checkpoint in {str(path)!r} is undamaged:\n  {listed}\n"
        "Restore one of them from a copy, or start again in another directory: "
        f"checkpoint.Directory({str(path)!r}).child('again')."
    )


def with_another_optimizer(path: Path) -> str:
    """How to train the variables of a run with another optimizer, as code."""
    return (
        "To train its variables with another optimizer, begin another run with them:\n"
        f"    runs = checkpoint.Directory({str(path)!r})\n"
        "    with rng.scope(0):\n"
        "        state = trainer.make_state(runs.load_vars(state))\n"
        "    state = trainer.fit(state, train, checkpoints=runs.child('second'))"
    )


def of_other_leaves(path: Path, found: Found, listing: ResumeMismatch) -> ResumeMismatch:
    """The error when a checkpoint is undamaged, and does not match the template."""
    if not isinstance(listing, one.OtherLeaves):
        return ResumeMismatch(f"{str(found.path)!r}: {listing}")
    start = f"the checkpoint of step {found.step} in {str(path)!r} does not match the state that was passed:{listing}\n"
    if listing.in_opt_state:
        return ResumeMismatch(
            f"{start}The variables fit, and the optimizer is another one. Use the optimizer of that run to resume it. "
            f"{with_another_optimizer(path)}"
        )
    return ResumeMismatch(
        f"{start}Use the model and the optimizer of that run, or start another run in another directory: "
        f"checkpoint.Directory({str(path)!r}).child('second')."
    )
