"""Disk: every file operation that checkpoints need, in one class, so that tests can stop or fail any of them."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Disk", "Entry", "begin_sync"]

# Links are not followed, and child processes do not inherit the file.
_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 16 << 20
_MANY = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2
_SEEKING = threading.Lock()  # where the system cannot read from a place without moving to it


class Entry(NamedTuple):
    """A name in a folder.

    Attributes:
        name: The name.
        is_folder: Whether it is a folder; False for a link.
        is_file: Whether it is a plain file; False for a link.
    """

    name: str
    is_folder: bool
    is_file: bool


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    """The function of Linux's C library, which Python does not have; None on other systems."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


def begin_sync(file: int) -> bool:
    """Let the system begin to bring a file's bytes to the disk, and return whether it does. Nothing is waited for.

    An error of the disk is one of the ``sync`` that comes after it.
    """
    begin = _sync_file_range()
    return begin is not None and begin(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE) == 0


class Disk:
    """Operations on the real disk. Files are given by their descriptors. Each operation may raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Make a folder; FileExistsError if there is one."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Make a file and open it for writing; FileExistsError if there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)

    def write(self, file: int, data: memoryview) -> None:
        """Write all of the bytes. The system begins to bring many of them to the disk, so that ``sync`` waits less."""
        while data:
            written = os.write(file, data[:_PIECE])
            if written >= _MANY:
                begin_sync(file)
            data = data[written:]

    def sync(self, file: int) -> None:
        """Wait until the file's bytes are on the disk, so that they survive a loss of power."""
        try:
            import fcntl

            # On macOS fsync may leave the bytes in the cache of the drive.
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
        except (ImportError, AttributeError, OSError):
            os.fsync(file)

    def close(self, file: int) -> None:
        """Close a file."""
        os.close(file)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk; a new or renamed file is lost if its name is not."""
        if os.name == "nt":
            return  # Windows does this by itself, and cannot open a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, path: Path, to: Path) -> None:
        """Move a folder to a new name."""
        path.rename(to)

    def remove(self, path: Path) -> None:
        """Remove a file; of a link, the link."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def entries(self, path: Path) -> list[Entry]:
        """The names in a folder, sorted."""
        with os.scandir(path) as found:
            return sorted(
                Entry(e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False)) for e in found
            )

    def open(self, path: Path) -> tuple[int, int]:
        """Open a plain file for reading, and return its descriptor and its size in bytes.

        Raises:
            OSError: If it cannot be opened, or is a link, a folder, a pipe or a device.
        """
        file = os.open(path, os.O_RDONLY | _PLAIN | getattr(os, "O_NONBLOCK", 0))
        try:
            about = os.fstat(file)
            if not stat.S_ISREG(about.st_mode):
                raise FileNotFoundError(f"{str(path)!r} is not a plain file")
        except BaseException:
            os.close(file)
            raise
        return file, about.st_size

    def seek(self, file: int, offset: int) -> None:
        """Let the next read begin at this byte of the file."""
        os.lseek(file, offset, os.SEEK_SET)

    def read(self, file: int, into: memoryview) -> int:
        """Read the next bytes into memory, and return how many; fewer than asked for only at the end of the file."""
        got = 0
        while got < len(into):
            piece = into[got : got + _PIECE]
            data = os.read(file, len(piece)) if not hasattr(os, "readv") else None
            n = os.readv(file, [piece]) if data is None else len(data)
            if not n:
                break
            if data is not None:
                piece[:n] = data
            got += n
        return got

    def read_at(self, file: int, at: int, into: memoryview) -> int:
        """As ``read``, from a byte of the file on; several threads may read from one file."""
        if not hasattr(os, "preadv"):
            with _SEEKING:
                self.seek(file, at)
                return self.read(file, into)
        got = 0
        while got < len(into) and (n := os.preadv(file, [into[got : got + _PIECE]], at + got)):
            got += n
        return got

    def free(self, path: Path) -> int:
        """How many bytes are free for a folder."""
        return shutil.disk_usage(path).free
