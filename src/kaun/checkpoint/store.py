"""Store: an open Directory, in which a run finds and saves its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import threading
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Self

from kaun._messages import warn
from kaun.checkpoint import one
from kaun.checkpoint.directory import Directory, Found, all_damaged, of_other_leaves, scan
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.listed import Listed
from kaun.checkpoint.lock import Lock, Locked
from kaun.checkpoint.one import Saved
from kaun.errors import ResumeMismatch
from kaun.state import TrainState
from kaun.tree import flatten, format_bytes

__all__ = ["Saved", "Store"]

_UNFINISHED = re.compile(r"\.kaun-[0-9a-f]{16}\.tmp", re.ASCII)
_left_writing: dict[Path, threading.Event] = {}
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_PROBE = memoryview(bytes(1 << 16))


class Store:
    """A Directory in use: locked, writable, with at most one save in progress. Open one with ``Store.open``.

    Attributes:
        read_only: The error of a directory that has checkpoints and cannot be written. Nothing is locked then, and only
            ``newest`` can be used.
    """

    def __init__(self, directory: Directory, disk: Disk, lock: Lock | None, read_only: OSError | None = None) -> None:
        self._directory, self._disk, self._lock = directory, disk, lock
        self.read_only: OSError | None = read_only
        # Waited for instead of the thread: in Python 3.11 an interrupted Thread.join takes the thread for ended.
        self._written = threading.Event()
        self._written.set()
        self._guard = threading.Lock()
        self._closed = False  # of the thread that writes and close(), the later one releases the lock
        self._failed: BaseException | None = None
        self._listed: Listed | None = None  # by the first save: no save may cost more where more are kept
        self._warnings: list[str] = []

    @classmethod
    def open(cls, directory: Directory, disk: Disk | None = None) -> Store:
        """Make the folder, lock it, remove what interrupted saves left behind, and check that files can be written.

        Raises:
            FileNotFoundError: If there is no checkpoint under ``resume="must"``.
            FileExistsError: If there is one under ``resume="never"``.
            RuntimeError: If another run uses the directory.
            OSError: If nothing can be written there; the message says what to do. Where there are checkpoints and
                the disk is read-only, the error is ``read_only``: of a run that is finished they are read.
        """
        disk = disk or Disk()
        with _explained(directory):
            there = scan(disk, directory.path)
        _may_begin(directory, there)
        try:
            with _explained(directory):
                return cls(directory, disk, _locked(disk, directory.path))
        except OSError as err:
            if there and err.errno in _READ_ONLY:
                return cls(directory, disk, None, err)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def newest(self, like: TrainState, fault: Callable[[TrainState], str] = lambda state: "") -> Saved | None:
        """Return the newest undamaged checkpoint, None if there is no checkpoint at all.

        Damaged checkpoints that are newer are renamed, with a warning. It is also checked that the disk has space for
        one more checkpoint.

        Args:
            like: A state with the structure, shapes and dtypes of those saved.
            fault: Says what is wrong with a state, so that its checkpoint counts as damaged; empty where nothing is.

        Raises:
            ResumeMismatch: If the checkpoint has other leaves, shapes or dtypes than ``like``.
            ValueError: If there are checkpoints and every one is damaged; each is listed.
            OSError: If a checkpoint of this size does not fit on the disk.
        """
        self.join()
        if self.read_only is None:
            self._must_fit(like)
        bad: list[tuple[Found, str]] = []
        for found in scan(self._disk, self._directory.path):
            try:
                saved = one.read(self._disk, found.path, found.step, like)
                if wrong := fault(saved.state):
                    raise one.Damaged(wrong)
            except one.Damaged as err:
                bad.append((found, f"{found.path.name}: {err}"))
                continue
            except ResumeMismatch as err:
                raise of_other_leaves(self._directory, found, err) from None
            if bad:
                self._rename_damaged(bad, found)
            return saved
        if bad:
            raise all_damaged(self._directory, [text for _, text in bad])
        return None

    def save(self, step: int, state: TrainState, reports: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Wait for the save before, copy everything from the device, and write it in a thread.

        Args:
            step: The run's step. An earlier checkpoint of the same step is replaced once the new one is on the disk.
            state: The state.
            reports: Arrays (JAX's come back as NumPy's) and JSON values, by name.
            facts: JSON values, by name.

        Raises:
            OSError: If the save before failed.
            TypeError: If a value cannot be stored; nothing is written.
        """
        self.join()
        draft = one.Draft(step, state, reports, facts)
        # Not a daemon thread: Python waits for it before the process ends.
        self._written.clear()
        try:
            threading.Thread(target=self._write, args=(draft,), name="kaun-checkpoint").start()
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
                    _left_writing[self._directory.path.resolve()] = self._written

    def _write(self, draft: one.Draft) -> None:
        try:
            self._put(draft)
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

    def _put(self, draft: one.Draft) -> None:
        disk, path = self._disk, self._directory.path
        temporary = path / f".kaun-{secrets.token_hex(8)}.tmp"
        try:
            draft.write(disk, temporary)
            self._name(draft.step, temporary)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(disk, temporary)
            raise
        # Older ones are removed only after this: before it, a loss of power could undo the renaming of the new one.
        disk.sync_folder(path)
        try:
            self._remove_old()
        except OSError as err:
            self._warnings.append(
                f"the checkpoint of step {draft.step} was written, but an older one could not be removed from "
                f"{str(path)!r}: {err}. This is tried again after the next save."
            )

    def _name(self, step: int, temporary: Path) -> None:
        """Move a checkpoint to its own name, and note which ones it makes superfluous."""
        path, keep = self._directory.path, self._directory.keep
        if self._listed is None:
            self._listed = Listed(scan(self._disk, path), keep)
        found = self._listed.next(path, step)
        try:
            self._disk.rename(temporary, found.path)
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another program put a folder of that name there after the directory was listed.
            self._listed = Listed(scan(self._disk, path), keep)
            found = self._listed.next(path, step)
            self._disk.rename(temporary, found.path)
        self._listed.add(found)

    def _remove_old(self) -> None:
        assert self._listed is not None
        old = self._listed.old
        while old:
            # Renamed first: a checkpoint that is removed in part would look like a damaged one.
            away = self._directory.path / f".kaun-{secrets.token_hex(8)}.tmp"
            with contextlib.suppress(FileNotFoundError):  # another program removed it
                self._disk.rename(old[0].path, away)
                _remove(self._disk, away)
            old.pop(0)

    def _rename_damaged(self, bad: list[tuple[Found, str]], sound: Found) -> None:
        path, self._listed = self._directory.path, None
        taken = {entry.name for entry in self._disk.entries(path)}
        moved: list[str] = []
        for found, text in bad:
            names = (f"damaged-{found.path.name}" + (f"-{i}" if i else "") for i in range(len(taken) + 1))
            name = next(name for name in names if name not in taken)
            taken.add(name)
            if self.read_only is None:
                self._disk.rename(found.path, path / name)
                text += f"\n    (kept as {name})"
            moved.append(text)
        if self.read_only is None:
            self._disk.sync_folder(path)
        listed = "\n  ".join(moved)
        warn(
            f"{str(path)!r}: the run resumes from step {sound.step}, because newer checkpoints are damaged:\n  "
            f"{listed}",
        )

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
        return _error(err, f"{text} {_advice(err)}")


def _may_begin(directory: Directory, there: list[Found]) -> None:
    path = str(directory.path)
    if directory.resume == "must" and not there:
        raise FileNotFoundError(
            f"there is no checkpoint in {path!r}, and resume='must' needs one. Check the path, or start a run with "
            "resume='auto'."
        )
    if directory.resume == "never" and there:
        raise FileExistsError(
            f"{path!r} has a checkpoint of step {there[0].step}, and resume='never' needs a directory without one. "
            f"Start in another directory, checkpoint.Directory({path!r}).child('second'), or resume with resume='auto'."
        )


def _locked(disk: Disk, path: Path) -> Lock:
    """Make and lock a folder, and check that files can be written."""
    _wait_for_writer(path)
    _make(disk, path)
    lock = Lock(path)
    try:
        _tidy(disk, path)
        _probe(disk, path)
    except BaseException:
        lock.release()
        raise
    return lock


def _wait_for_writer(path: Path) -> None:
    """Wait for the thread of an earlier run of this process, which an interrupt left behind while it was writing."""
    written = _left_writing.get(path.resolve())
    if written is not None:
        written.wait()
        _left_writing.pop(path.resolve(), None)


def _make(disk: Disk, path: Path) -> None:
    """Make a folder and its missing parents, each on the disk before the next is made."""
    path = path.absolute()
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by another process meanwhile
            disk.make_folder(folder)
        disk.sync_folder(folder.parent)


def _tidy(disk: Disk, path: Path) -> None:
    for entry in disk.entries(path):
        if not entry.is_file and _UNFINISHED.fullmatch(entry.name):
            _remove(disk, path / entry.name)


def _remove(disk: Disk, path: Path) -> None:
    """Remove a folder and everything in it; of a link, the link."""
    if path.is_symlink():
        disk.remove(path)
        return
    for entry in disk.entries(path):
        if entry.is_folder:
            _remove(disk, path / entry.name)
        else:
            disk.remove(path / entry.name)
    disk.remove_folder(path)


def _probe(disk: Disk, path: Path) -> None:
    """Do the operations of a save once, so that one that cannot work fails before the first step."""
    temporary = path / f".kaun-{secrets.token_hex(8)}.tmp"
    disk.make_folder(temporary)
    try:
        file = disk.create(temporary / "probe")
        try:
            disk.write(file, _PROBE)
            disk.sync(file)
        finally:
            disk.close(file)
        disk.sync_folder(temporary)
        moved = path / f".kaun-{secrets.token_hex(8)}.tmp"
        disk.rename(temporary, moved)
        temporary = moved
        disk.sync_folder(path)
    finally:
        _remove(disk, temporary)


@contextlib.contextmanager
def _explained(directory: Directory) -> Generator[None, None, None]:
    path = str(directory.path)
    try:
        yield
    except Locked as err:
        raise Locked(
            f"{path!r} is in use {err}. Two runs cannot write into one directory: wait for that run, or use another "
            f"directory: checkpoint.Directory({path!r}).child('second')."
        ) from None
    except OSError as err:
        raise _error(err, f"checkpoints cannot be written to {path!r}: {err.strerror or err}. {_advice(err)}") from err


def _error(err: OSError, text: str) -> OSError:
    return OSError(text) if err.errno is None else OSError(err.errno, text)


def _advice(err: OSError) -> str:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space on that disk, or choose a directory on another one; then run the same script again"
    if err.errno == errno.EFBIG:
        return "The system limits the size of files (ulimit -f): raise the limit, then run the same script again"
    if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Choose a directory that you may write to"
    if err.errno in (errno.ENOTDIR, errno.EEXIST):
        return "A file is where a folder should be: choose another path"
    return "Choose a directory on a disk that works; then run the same script again"
