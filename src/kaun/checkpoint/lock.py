"""Lock: one run at a time in a directory, held by the operating system for as long as the process lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from datetime import datetime
from pathlib import Path

from kaun._messages import warn
from kaun.checkpoint import strict_json
from kaun.errors import Locked

__all__ = ["NAME", "Lock", "Locked"]

NAME = "lock"
_LARGEST = 4096
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_guard = threading.Lock()
# By the lock's file: where locks belong to processes (on network file systems), the system would give one twice.
_held: dict[tuple[int, int], int] = {}


class Lock:
    """The lock of a folder, taken when this is made.

    The file stays when the lock is let go: to remove it would let two others hold one lock each.

    Raises:
        Locked: when another process, or another user in this one, holds it.
        OSError: when the file cannot be made.
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
                    raise Locked(_who(file))
                _held[self._id] = file
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self._sign(file)

    def _sign(self, file: int) -> None:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without a name on it
            os.ftruncate(file, 0)
            os.write(file, json.dumps(about).encode())

    def release(self) -> None:
        """Lets go of the lock; a second time does nothing."""
        with _guard:
            if _held.get(self._id) != self._file or self._released:
                return
            self._released = True
            os.close(_held.pop(self._id))


def _take(file: int) -> bool:
    """Whether the lock was free, and is held now."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # far behind the text, which others may read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as err:
        warn(
            f"the file system of a checkpoint directory cannot lock files ({err.strerror}), so kaun cannot see whether "
            "another run writes there. Make sure that none does.",
        )
    return True


def _who(file: int) -> str:
    """Who signed the lock, in words; what is in the file may be anything."""
    try:
        found = strict_json.loads(os.read(file, _LARGEST), _LARGEST)
        return f"by process {int(found['process'])} on {str(found['host'])!r} since {str(found['since'])!r}"
    except (ValueError, TypeError, KeyError, OSError):
        return "by another process"


def _forget() -> None:
    """A forked child must not hold its parent's locks when that is killed."""
    for file in _held.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
