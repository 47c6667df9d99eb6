"""Store: an open Directory, in which a run finds and saves its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from kaun._messages import warn
from kaun.checkpoint import one
from kaun.checkpoint.best import BRANCH, Best
from kaun.checkpoint.directory import Directory
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.folders import (
    Found,
    all_damaged,
    best_of,
    newest_facts,
    not_there,
    of_other_leaves,
    parse_name,
    scan,
)
from kaun.checkpoint.group import ALONE, Group
from kaun.checkpoint.listed import Listed
from kaun.checkpoint.lock import Lock
from kaun.checkpoint.manifest import FileDigest
from kaun.checkpoint.one import Saved
from kaun.checkpoint.opening import (
    advice,
    as_error,
    explained,
    left_writing,
    locked,
    may_begin,
    must_be_shared,
    remove,
    temporary_name,
)
from kaun.checkpoint.parts import Share
from kaun.checkpoint.together import read_together, verify_together
from kaun.errors import ResumeMismatch
from kaun.state import TrainState
from kaun.tree import flatten, format_bytes

__all__ = ["Saved", "Store"]

T = TypeVar("T")

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Store:
    """A Directory in use: locked, writable, with at most one save in progress. Open one with ``Store.open``.

    Attributes:
        read_only: The error of a directory that has checkpoints and cannot be written. Nothing is locked then, and only
            ``newest`` and ``check_best`` can be used.
    """

    def __init__(self, directory: Directory, disk: Disk, group: Group) -> None:
        self._directory, self._disk, self._group = directory, disk, group
        self._lock: Lock | None = None
        self.read_only: OSError | None = None
        self._share = Share(group.index, group.count) if group.count > 1 else None
        # Waited for instead of the thread: in Python 3.11 an interrupted Thread.join takes the thread for ended.
        self._written = threading.Event()
        self._written.set()
        self._guard = threading.Lock()
        self._closed = False  # of the thread that writes and close(), the later one releases the lock
        self._failed: BaseException | None = None
        self._listed: Listed | None = None  # by the first save: no save may cost more where more are kept
        self._last: int | None = None  # the step that a run goes back to, until the first save moves later ones away
        self._warnings: list[str] = []

    @classmethod
    def open(cls, directory: Directory, disk: Disk | None = None, group: Group = ALONE) -> Store:
        """Make the folder, lock it, remove what interrupted saves left behind, and check that files can be written.

        Args:
            directory: The directory.
            disk: The disk, by default the real one.
            group: The processes that write each checkpoint together; process 0 holds the lock.

        Raises:
            FileNotFoundError: If there is no checkpoint under a ``resume`` that needs one.
            FileExistsError: If there is one under ``resume="never"``.
            RuntimeError: If another run uses the directory.
            OSError: If nothing can be written there; the message says what to do. Where there are checkpoints and
                the disk is read-only, the error is ``read_only``: of a run that is finished they are read.
            FailedElsewhere: If one of these is raised in another process of the group, or it does not come in time.
        """
        store = cls(directory, disk or Disk(), group)
        try:
            problem = group.first(store._begin)
            if problem is not None and store.read_only is None:
                store.read_only = OSError(*problem)
            must_be_shared(store._disk, directory.path, group)
        except BaseException:
            store.close()
            raise
        return store

    def _begin(self) -> tuple[int | None, str] | None:
        """Lock the directory; number and text of the error where it can only be read."""
        directory, disk = self._directory, self._disk
        with explained(directory):
            there = scan(disk, directory.path)
        may_begin(directory, there)
        try:
            with explained(directory):
                self._lock = locked(disk, directory.path)
        except OSError as err:
            if not there or err.errno not in _READ_ONLY:
                raise
            self.read_only = err
            return err.errno, str(err.strerror)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def newest(self, like: TrainState, fault: Callable[[TrainState], str] = lambda state: "") -> Saved | None:
        """Return the newest undamaged checkpoint, None if there is no checkpoint at all.

        If ``resume=`` names another one to which the run did not go back yet, that one is returned, and later ones are
        not looked at until the first save. Damaged checkpoints that are newer are renamed, with a warning. It is also
        checked that the disk has space for one more checkpoint.

        Args:
            like: A state with the structure, shapes and dtypes of those saved.
            fault: Says what is wrong with a state, so that its checkpoint counts as damaged; empty where nothing is.

        Raises:
            ResumeMismatch: If the checkpoint has other leaves, shapes or dtypes than ``like``.
            ValueError: If there are checkpoints and every one is damaged, or the one that ``resume=`` names is; each is
                listed.
            FileNotFoundError: If there is no checkpoint that ``resume=`` names.
            OSError: If a checkpoint of this size does not fit on the disk.
        """
        self.join()
        bad: list[tuple[Found, str]] = []
        for name in self._group.first(lambda: self._candidates(like)):
            path = self._directory.path / name
            found = parse_name(path)
            assert found is not None
            try:
                read, wrong = read_together(self._group, self._disk, found, like, fault)
            except ResumeMismatch as err:
                raise of_other_leaves(self._directory.path, found, err) from None
            if not read:
                bad.append((found, f"{found.path.name}: {wrong}"))
                continue
            if bad:
                self._warn_of_damaged(bad, found)
            return read[0]
        if bad:
            raise all_damaged(self._directory.path, [text for _, text in bad])
        return None

    def _candidates(self, like: TrainState) -> list[str]:
        """The names of the checkpoints from which the run may be resumed, the newest first."""
        if self.read_only is None:
            self._must_fit(like)
        return [found.path.name for found in self._choose()]

    def _choose(self) -> list[Found]:
        path, asked = self._directory.path, self._directory.resume
        there = scan(self._disk, path)
        if self._last is not None:
            return [found for found in there if found.step <= self._last]
        branch = newest_facts(self._disk, there).get(BRANCH) if asked == "best" or isinstance(asked, int) else asked
        if branch == asked or self._listed is not None:
            return there
        what = best_of(self._disk, path, there) if isinstance(asked, str) else asked
        self._last = what if isinstance(what, int) else what.step
        named = [found for found in there if found.step == self._last]
        if not named:
            raise not_there(path, what, there)
        return named

    def check_best(self, best: Best) -> str:
        """Verify the checkpoint of the best step, and return what is wrong with it; empty if nothing is."""
        there = self._group.first(
            lambda: [found.path.name for found in scan(self._disk, self._directory.path) if found.step == best.step]
        )
        wrong = "it is not there"
        for name in there:
            wrong = verify_together(self._group, self._disk, Found(best.step, 0, self._directory.path / name))
            if not wrong:
                break
        return wrong

    def in_all(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns here, where it raises in no process of the group.

        Raises:
            Exception: What it raised here.
            FailedElsewhere: If it raised in another process, or one does not come in time.
        """
        made: list[T] = []
        self._group.gather(lambda: made.append(act()))
        return made[0]

    def save(self, step: int, state: TrainState, reports: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Wait for the save before, copy everything from the device, and write it in a thread.

        Args:
            step: The run's step. An earlier checkpoint of the same step is replaced once the new one is on the disk.
            state: The state.
            reports: Arrays (JAX's come back as NumPy's) and JSON values, by name.
            facts: JSON values, by name; among them the record of the best step, ``Best.fact``.

        Raises:
            OSError: If the save before failed.
            TypeError: If a value cannot be stored; nothing is written.
        """
        self.join()
        draft, best = self.in_all(lambda: (one.Draft(step, state, reports, facts, self._share), Best.of(facts)))
        # Not a daemon thread: Python waits for it before the process ends.
        self._written.clear()
        try:
            threading.Thread(target=self._write, args=(draft, best), name="kaun-checkpoint").start()
        except RuntimeError:  # the system has no thread left
            self._written.set()
            raise

    def join(self) -> None:
        """Wait for the save in progress.

        Raises:
            OSError: If it failed; earlier checkpoints are untouched.
        """
        self._written.wait()
        warnings, self._warnings = self._warnings, []
        for text in warnings:
            warn(text)
        failed, self._failed = self._failed, None
        if isinstance(failed, OSError):
            raise self._not_written(failed) from failed
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Wait for the save in progress, and release the directory; the second call does nothing.

        Where the waiting is interrupted (Ctrl-C), the thread releases the directory when it has written.

        Raises:
            OSError: If the save failed.
        """
        try:
            self.join()
        finally:
            with self._guard:
                self._closed = True
                if self._written.is_set():
                    self._release()
                else:
                    left_writing[self._directory.path.resolve()] = self._written

    def _write(self, draft: one.Draft, best: Best | None) -> None:
        try:
            self._put(draft, best)
        except BaseException as err:
            self._failed = err
        finally:
            with self._guard:
                if self._closed:
                    self._release()
                self._written.set()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _put(self, draft: one.Draft, best: Best | None) -> None:
        temporary = self._directory.path / self._group.first(lambda: temporary_name(self._directory.path).name)
        try:
            records = self._group.gather(lambda: draft.write_files(self._disk, temporary))
            self._group.first(lambda: self._publish(draft, temporary, records, best))
        except BaseException:
            self._listed = None  # it may count on a best checkpoint that was not written
            with contextlib.suppress(OSError):
                if self._group.index == 0:
                    remove(self._disk, temporary)
            raise

    def _publish(self, draft: one.Draft, temporary: Path, records: list[Any], best: Best | None) -> None:
        """Give a checkpoint, whose files with arrays are written, its manifest and its name, and remove old ones."""
        disk, path = self._disk, self._directory.path
        draft.seal(disk, temporary, {name: FileDigest(*record) for each in records for name, record in each.items()})
        self._move_later_away()
        self._name(draft.step, temporary, best)
        # Older ones are removed only after this: before it, a loss of power could undo the renaming of the new one.
        disk.sync_folder(path)
        try:
            self._remove_old()
        except OSError as err:
            self._warnings.append(
                f"the checkpoint of step {draft.step} was written, but an older one could not be removed from "
                f"{str(path)!r}: {err}. This is tried again after the next save."
            )

    def _move_later_away(self) -> None:
        """Rename the checkpoints after the one that the run went back to, the newest first."""
        if self._last is None:
            return
        later = [found for found in scan(self._disk, self._directory.path) if found.step > self._last]
        for found, name in self._names("aside", later):
            self._disk.rename(found.path, name)
        self._disk.sync_folder(self._directory.path)
        self._last = self._listed = None

    def _names(self, start: str, folders: Iterable[Found]) -> list[tuple[Found, Path]]:
        """Free names for folders that are kept under another name, and are not checkpoints of the run any more."""
        path = self._directory.path
        taken, pairs = {entry.name for entry in self._disk.entries(path)}, list[tuple[Found, Path]]()
        for found in folders:
            names = (f"{start}-{found.path.name}" + (f"-{i}" if i else "") for i in range(len(taken) + 1))
            name = next(name for name in names if name not in taken)
            taken.add(name)
            pairs.append((found, path / name))
        return pairs

    def _name(self, step: int, temporary: Path, best: Best | None) -> None:
        """Move a checkpoint to its own name, and note which ones it makes superfluous."""
        path, options = self._directory.path, (self._directory.keep, self._directory.forever, best)
        if self._listed is None:
            self._listed = Listed(scan(self._disk, path), *options)
        found = self._listed.next(path, step)
        try:
            self._disk.rename(temporary, found.path)
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another program put a folder of that name there after the directory was listed.
            self._listed = Listed(scan(self._disk, path), *options)
            found = self._listed.next(path, step)
            self._disk.rename(temporary, found.path)
        self._listed.add(found, best)

    def _remove_old(self) -> None:
        assert self._listed is not None
        old = self._listed.old
        while old:
            # Renamed first: a checkpoint that is removed in part would look like a damaged one.
            away = temporary_name(self._directory.path)
            with contextlib.suppress(FileNotFoundError):  # another program removed it
                self._disk.rename(old[0].path, away)
                remove(self._disk, away)
            old.pop(0)

    def _warn_of_damaged(self, bad: list[tuple[Found, str]], sound: Found) -> None:
        listed = "\n  ".join(self._group.first(lambda: self._rename_damaged(bad)))
        warn(
            f"{str(self._directory.path)!r}: the run resumes from step {sound.step}, because newer checkpoints are "
            f"damaged:\n  {listed}",
        )

    def _rename_damaged(self, bad: list[tuple[Found, str]]) -> list[str]:
        path, self._listed = self._directory.path, None
        moved = [text for _, text in bad]
        for i, (found, name) in enumerate(self._names("damaged", [found for found, _ in bad])):
            if self.read_only is None:
                self._disk.rename(found.path, name)
                moved[i] += f"\n    (kept as {name.name})"
        if self.read_only is None:
            self._disk.sync_folder(path)
        return moved

    def _must_fit(self, like: TrainState) -> None:
        sizes = [(getattr(leaf, "size", 1), getattr(leaf, "dtype", None)) for leaf in flatten(like)[0].values()]
        needed = sum(size * getattr(dtype, "itemsize", 8) for size, dtype in sizes)
        free = self._disk.free(self._directory.path)
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint of this state takes {format_bytes(needed)}, and {format_bytes(free)} are free for "
                f"{str(self._directory.path)!r}. Free some space, or choose a directory on another disk",
            )

    def _not_written(self, err: OSError) -> OSError:
        there = scan(self._disk, self._directory.path)
        left = f"The newest checkpoint is of step {there[0].step}." if there else "There is no checkpoint yet."
        text = f"a checkpoint could not be written to {str(self._directory.path)!r}: {err.strerror or err}. {left}"
        return as_error(err, f"{text} {advice(err)}")
