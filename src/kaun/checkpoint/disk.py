"""Disk: every operation on files that a checkpoint is made of, so that a test can stop, fail or forget any of them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["Disk", "Entry"]

# No link is followed, no pipe waited for, and no child process inherits the file.
_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 16 << 20


class Entry(NamedTuple):
    """A name in a folder. A link is neither a folder nor a file, wherever it leads."""

    name: str
    is_folder: bool
    is_file: bool


class Disk:
    """Operations on the real disk. Files are file descriptors. Each may raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Makes a folder that was not there."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Opens for writing a file that was not there."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)

    def write(self, file: int, data: memoryview) -> None:
        """Writes all of the bytes."""
        while data:
            data = data[os.write(file, data[:_PIECE]) :]

    def sync(self, file: int) -> None:
        """Comes back when the file's bytes are on the disk, safe from a loss of power."""
        try:
            import fcntl

            # On a Mac fsync leaves them in the drive's own memory.
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
        except (ImportError, AttributeError, OSError):
            os.fsync(file)

    def close(self, file: int) -> None:
        """Closes a file."""
        os.close(file)

    def sync_folder(self, path: Path) -> None:
        """Comes back when the names in a folder are on the disk: a new or moved file is lost without its name."""
        if os.name == "nt":
            return  # which does this by itself, and cannot open a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, path: Path, to: Path) -> None:
        """Moves a folder to a name that was not there."""
        path.rename(to)

    def remove(self, path: Path) -> None:
        """Removes a file, or a link itself."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        path.rmdir()

    def entries(self, path: Path) -> list[Entry]:
        """What is in a folder, sorted by name."""
        with os.scandir(path) as found:
            return sorted(
                Entry(e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False)) for e in found
            )

    def open(self, path: Path) -> tuple[int, int]:
        """Opens a plain file for reading: its descriptor, and its size in bytes.

        Raises:
            OSError: also for a link, a folder, a pipe or a device in its place.
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

    def read(self, file: int, into: memoryview) -> int:
        """Fills the memory from where the file stands; fewer bytes than asked for only where the file ends."""
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

    def free(self, path: Path) -> int:
        """How many bytes may still be written into a folder."""
        return shutil.disk_usage(path).free
