"""Lock: one run at a time in a directory. The operating system releases it when the process ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from datetime import datetime
from pathlib import Path

from kaun._messages import quoted, warn
from kaun.checkpoint import strict_json
from kaun.errors import Locked

__all__ = ["NAME", "Lock", "Locked"]

NAME = ".kaun-lock"  # a user's file would not have this name
_LARGEST = 4096
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_guard = threading.Lock()
# The locks of this process by file: on network file systems locks belong to processes, and the system would grant a
# second one to the same process.
_held: dict[tuple[int, int], int] = {}


class Lock:
    """The lock of a folder, taken by the constructor.

    The file stays when the lock is released: if it were removed, two other processes could each hold a lock of a file
    of that name.

    Args:
        folder: The folder; the lock is a file in it.

    Raises:
        Locked: If another process, or another run of this process, holds the lock.
        OSError: If the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._released = False
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        about = os.fstat(file)
        self._id = about.st_dev, about.st_ino
        try:
            with _guard:
                if self._id in _held:
                    raise Locked("by another fit of this process")
                if not _take(file):
                    raise Locked(_owner(file))
                _held[self._id] = file
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self._write_owner(file)

    def _write_owner(self, file: int) -> None:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # on a full disk the lock works without this text
            os.ftruncate(file, 0)
            os.write(file, json.dumps(about).encode())

    def release(self) -> None:
        """Release the lock; the second call does nothing."""
        with _guard:
            if _held.get(self._id) != self._file or self._released:
                return
            self._released = True
            os.close(_held.pop(self._id))


def _take(file: int) -> bool:
    """Take the lock if it is free, and return whether it was."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # far behind the text, which other processes may read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as err:
        warn(
            f"the file system of a checkpoint directory cannot lock files ({err.strerror}), so kaun cannot detect "
            "whether another run writes there. Make sure that none does.",
        )
    return True


def _owner(file: int) -> str:
    """Who holds the lock, in words; the content of the file is not trusted."""
    try:
        found = strict_json.loads(os.read(file, _LARGEST), _LARGEST)
        return f"by process {int(found['process'])} on {quoted(found['host'])} since {quoted(found['since'])}"
    except (ValueError, TypeError, KeyError, OSError):
        return "by another process"


def _forget() -> None:
    """Close the locks in a forked child, which would otherwise hold them after its parent is killed."""
    for file in _held.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
