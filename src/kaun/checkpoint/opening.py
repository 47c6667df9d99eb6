"""A directory is opened for a run: created, locked, cleaned and tested; and the messages of its errors."""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import threading
from collections.abc import Generator
from pathlib import Path

from kaun.checkpoint.directory import Directory
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.folders import Found
from kaun.checkpoint.group import Group
from kaun.checkpoint.lock import Lock, Locked

__all__ = [
    "advice",
    "as_error",
    "explained",
    "left_writing",
    "locked",
    "may_begin",
    "must_be_shared",
    "remove",
    "temporary_name",
]

_UNFINISHED = re.compile(r"\.kaun-[0-9a-f]{16}\.tmp", re.ASCII)
left_writing: dict[Path, threading.Event] = {}
_PROBE = memoryview(bytes(1 << 16))


def temporary_name(path: Path) -> Path:
    """A new temporary name in a folder. Folders with such names are removed when it is opened the next time."""
    return path / f".kaun-{secrets.token_hex(8)}.tmp"


def may_begin(directory: Directory, there: list[Found]) -> None:
    """Raise if ``resume=`` needs a checkpoint and there is none, or must not find one and there is one."""
    path, resume = str(directory.path), directory.resume
    if resume not in ("auto", "never") and not there:
        raise FileNotFoundError(
            f"there is no checkpoint in {path!r}, and resume={resume!r} needs one. Check the path, or start a run with "
            "resume='auto'."
        )
    if resume == "never" and there:
        raise FileExistsError(
            f"{path!r} has a checkpoint of step {there[0].step}, and resume='never' needs a directory without one. "
            f"Start in another directory, checkpoint.Directory({path!r}).child('second'), or resume with resume='auto'."
        )


def locked(disk: Disk, path: Path) -> Lock:
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
    written = left_writing.get(path.resolve())
    if written is not None:
        written.wait()
        left_writing.pop(path.resolve(), None)


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
            remove(disk, path / entry.name)


def remove(disk: Disk, path: Path) -> None:
    """Remove a folder and everything in it; of a link, the link."""
    if path.is_symlink():
        disk.remove(path)
        return
    for entry in disk.entries(path):
        if entry.is_folder:
            remove(disk, path / entry.name)
        else:
            disk.remove(path / entry.name)
    disk.remove_folder(path)


def must_be_shared(disk: Disk, path: Path, group: Group) -> None:
    """Raise in all processes unless each of them sees the folders that process 0 makes."""
    if group.count == 1:
        return
    name = group.first(lambda: _made(disk, path))

    def look() -> None:
        if name is not None and not (path / name).is_dir():
            raise FileNotFoundError(
                f"process {group.index} does not see in {str(path)!r} what process 0 wrote there. A checkpoint of "
                "several processes is one folder: choose a directory on a file system that all of them share."
            )

    try:
        group.gather(look)
    finally:
        if group.index == 0 and name is not None:
            disk.remove_folder(path / name)


def _made(disk: Disk, path: Path) -> str | None:
    """The name of a new temporary folder, None where none can be made."""
    made = temporary_name(path)
    try:
        disk.make_folder(made)
    except OSError:
        return None
    return made.name


def _probe(disk: Disk, path: Path) -> None:
    """Do the operations of a save once, so that one that cannot work fails before the first step."""
    temporary = temporary_name(path)
    disk.make_folder(temporary)
    try:
        file = disk.create(temporary / "probe")
        try:
            disk.write(file, _PROBE)
            disk.sync(file)
        finally:
            disk.close(file)
        disk.sync_folder(temporary)
        moved = temporary_name(path)
        disk.rename(temporary, moved)
        temporary = moved
        disk.sync_folder(path)
    finally:
        remove(disk, temporary)


@contextlib.contextmanager
def explained(directory: Directory) -> Generator[None, None, None]:
    """Add to an error of the disk, or of the lock, what to do about it."""
    path = str(directory.path)
    try:
        yield
    except Locked as err:
        raise Locked(
            f"{path!r} is in use {err}. Two runs cannot write into one directory: wait for that run, or use another "
            f"directory: checkpoint.Directory({path!r}).child('second')."
        ) from None
    except OSError as err:
        raise as_error(err, f"checkpoints cannot be written to {path!r}: {err.strerror or err}. {advice(err)}") from err


def as_error(err: OSError, text: str) -> OSError:
    """An error of the same kind with another text."""
    return OSError(text) if err.errno is None else OSError(err.errno, text)


def advice(err: OSError) -> str:
    """What to do about an error of the disk."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space on that disk, or choose a directory on another one; then run the same script again"
    if err.errno == errno.EFBIG:
        return "The system limits the size of files (ulimit -f): raise the limit, then run the same script again"
    if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Choose a directory that you may write to"
    if err.errno in (errno.ENOTDIR, errno.EEXIST):
        return "A file is where a folder should be: choose another path"
    return "Choose a directory on a disk that works; then run the same script again"
