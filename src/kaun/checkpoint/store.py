"""Store: what a run does with its Directory. It is held open while the run lasts."""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Self

from kaun._messages import warn
from kaun.checkpoint import one
from kaun.checkpoint.directory import Directory, Found, all_damaged, of_other_leaves, scan
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.lock import Lock, Locked
from kaun.checkpoint.one import Saved
from kaun.errors import ResumeMismatch
from kaun.state import TrainState
from kaun.tree import flatten

__all__ = ["Saved", "Store"]

_UNFINISHED = re.compile(r"\.kaun-[0-9a-f]{16}\.tmp", re.ASCII)
_PROBE = memoryview(bytes(1 << 16))


class Store:
    """A Directory in use: locked, known to be writable, one save in flight at most. Open one with ``Store.open``."""

    def __init__(self, directory: Directory, disk: Disk, lock: Lock) -> None:
        self._directory, self._disk, self._lock = directory, disk, lock
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._remarks: list[str] = []

    @classmethod
    def open(cls, directory: Directory, disk: Disk | None = None) -> Store:
        """Makes the folder, locks it, removes what killed saves left behind, and tries that files can be written.

        Raises:
            FileNotFoundError: for resume="must" without a checkpoint.
            FileExistsError: for resume="never" with one.
            RuntimeError: when another run holds the directory.
            OSError: when nothing can be written there; the message says what to do.
        """
        disk = disk or Disk()
        with _explained(directory):
            there = scan(disk, directory.path)
        _may_begin(directory, there)
        with _explained(directory):
            _make(disk, directory.path)
            lock = Lock(directory.path)
            try:
                _tidy(disk, directory.path)
                _probe(disk, directory.path)
            except BaseException:
                lock.release()
                raise
        return cls(directory, disk, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def newest(self, like: TrainState) -> Saved | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Damaged ones that are newer are moved aside, with a warning. Room for one more is looked for, too.

        Raises:
            ResumeMismatch: when it is sound and has other leaves, shapes or dtypes than ``like``.
            ValueError: when there are checkpoints and every one is damaged; each is listed.
            OSError: when a checkpoint of this size does not fit on the disk.
        """
        self.join()
        self._must_fit(like)
        bad: list[tuple[Found, str]] = []
        for found in scan(self._disk, self._directory.path):
            try:
                saved = one.read(self._disk, found.path, found.step, like)
            except one.Damaged as err:
                bad.append((found, f"{found.path.name}: {err}"))
                continue
            except ResumeMismatch as err:
                raise of_other_leaves(self._directory, found, err) from None
            if bad:
                self._set_aside(bad, found)
            return saved
        if bad:
            raise all_damaged(self._directory, [text for _, text in bad])
        return None

    def save(self, step: int, state: TrainState, reports: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Copies all of it from the device, waits for the save before, and leaves the rest to a thread.

        Arguments:
            step: the run's step. One of a step that is there already takes its place, once it is on the disk.
            state: the state.
            reports: arrays (JAX's come back as NumPy's) and JSON values, by name.
            facts: JSON values by name.

        Raises:
            OSError: of the save before, when that failed.
            TypeError: for what cannot be stored as it is; nothing was written.
        """
        self.join()
        draft = one.Draft(step, state, reports, facts)
        # Not a daemon: Python waits for it before it ends.
        self._thread = threading.Thread(target=self._write, args=(draft,), name="kaun-checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Waits for the save in flight.

        Raises:
            OSError: when that failed; the checkpoints before it are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        remarks, self._remarks = self._remarks, []
        for remark in remarks:
            warn(remark)
        failed, self._failed = self._failed, None
        if isinstance(failed, OSError):
            raise self._not_written(failed) from failed
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Waits for the save in flight and lets go of the directory; a second time does nothing.

        Raises:
            OSError: when that save failed.
        """
        try:
            self.join()
        finally:
            self._lock.release()

    def _write(self, draft: one.Draft) -> None:
        try:
            self._put(draft)
        except BaseException as err:
            self._failed = err

    def _put(self, draft: one.Draft) -> None:
        disk, path = self._disk, self._directory.path
        temporary = path / f".kaun-{secrets.token_hex(8)}.tmp"
        try:
            draft.write(disk, temporary)
            there = scan(disk, path)
            edition = 1 + max((found.edition for found in there if found.step == draft.step), default=-1)
            folder = path / (f"step-{draft.step:08d}" + (f".{edition}" if edition else ""))
            disk.rename(temporary, folder)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(disk, temporary)
            raise
        # Only now may an older one go: before this, a loss of power could take the new one's name back.
        disk.sync_folder(path)
        try:
            self._retain([Found(draft.step, edition, folder), *there])
        except OSError as err:
            self._remarks.append(
                f"the checkpoint of step {draft.step} is written, but an older one could not be removed from "
                f"{str(path)!r}: {err}. It will be tried again after the next save."
            )

    def _retain(self, there: list[Found]) -> None:
        there = sorted(there, reverse=True)
        kept = sorted({found.step for found in there}, reverse=True)[: self._directory.keep]
        newest = {step: max(found.edition for found in there if found.step == step) for step in kept}
        for found in there:
            if newest.get(found.step) != found.edition:
                # In one move out of sight: a half removed checkpoint would look like a damaged one.
                away = self._directory.path / f".kaun-{secrets.token_hex(8)}.tmp"
                self._disk.rename(found.path, away)
                _remove(self._disk, away)

    def _set_aside(self, bad: list[tuple[Found, str]], sound: Found) -> None:
        path = self._directory.path
        taken = {entry.name for entry in self._disk.entries(path)}
        moved: list[str] = []
        for found, text in bad:
            names = (f"damaged-{found.path.name}" + (f"-{i}" if i else "") for i in range(len(taken) + 1))
            name = next(name for name in names if name not in taken)
            taken.add(name)
            self._disk.rename(found.path, path / name)
            moved.append(f"{text}\n    (kept as {name})")
        self._disk.sync_folder(path)
        listed = "\n  ".join(moved)
        warn(
            f"{str(path)!r}: the run goes on from step {sound.step}, because what is newer is damaged:\n  {listed}",
        )

    def _must_fit(self, like: TrainState) -> None:
        sizes = [(getattr(leaf, "size", 1), getattr(leaf, "dtype", None)) for leaf in flatten(like)[0].values()]
        needed = sum(size * getattr(dtype, "itemsize", 8) for size, dtype in sizes)
        free = self._disk.free(self._directory.path)
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint of this state takes {_megabytes(needed)}, and {_megabytes(free)} are free for "
                f"{str(self._directory.path)!r}. Make room, or choose a directory on another disk",
            )

    def _not_written(self, err: OSError) -> OSError:
        there = scan(self._disk, self._directory.path)
        left = f"The newest one there is of step {there[0].step}." if there else "There is none yet."
        text = f"a checkpoint could not be written to {str(self._directory.path)!r}: {err.strerror or err}. {left}"
        return _error(err, f"{text} {_advice(err)}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _may_begin(directory: Directory, there: list[Found]) -> None:
    path = str(directory.path)
    if directory.resume == "must" and not there:
        raise FileNotFoundError(
            f"there is no checkpoint in {path!r}, and resume='must' needs one. Look for the right folder, or start "
            "with resume='auto'."
        )
    if directory.resume == "never" and there:
        raise FileExistsError(
            f"{path!r} has a checkpoint of step {there[0].step}, and resume='never' does not touch it. Start in a "
            f"directory of its own, checkpoint.Directory({path!r}).child('second'), or go on with resume='auto'."
        )


def _make(disk: Disk, path: Path) -> None:
    """Makes a folder and those that it is in, each of them on the disk before the next."""
    path = path.absolute()
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # by another process, just now
            disk.make_folder(folder)
        disk.sync_folder(folder.parent)


def _tidy(disk: Disk, path: Path) -> None:
    for entry in disk.entries(path):
        if not entry.is_file and _UNFINISHED.fullmatch(entry.name):
            _remove(disk, path / entry.name)


def _remove(disk: Disk, path: Path) -> None:
    """Removes a folder and all in it; of a link, the link."""
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
    """Does once what a save does, so that what would fail fails before the first step."""
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
            f"{path!r} is in use {err}. Two runs cannot write into one directory: wait for that one, or give this one "
            f"its own: checkpoint.Directory({path!r}).child('second')."
        ) from None
    except OSError as err:
        raise _error(err, f"checkpoints cannot be written to {path!r}: {err.strerror or err}. {_advice(err)}") from err


def _error(err: OSError, text: str) -> OSError:
    return OSError(text) if err.errno is None else OSError(err.errno, text)


def _advice(err: OSError) -> str:
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room on that disk, or choose a directory on another one; then run the same script again"
    if err.errno == errno.EFBIG:
        return "The system limits the size of files (ulimit -f): raise the limit, then run the same script again"
    if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Choose a directory that you may write to"
    if err.errno in (errno.ENOTDIR, errno.EEXIST):
        return "Something there is a file and no folder: choose another path"
    return "Choose a directory on a disk that works; then run the same script again"
