"""Files with checksums: hashed as they are written, and read only as they were written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from kaun.checkpoint import files
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.manifest import FileDigest
from kaun.checkpoint.safetensors_header import Short
from kaun.checkpoint.workers import LANES, Workers
from kaun.errors import ResumeMismatch

__all__ = ["Damaged", "FileContent", "Source", "reading"]

_PIECE = 4 << 20
_LARGE = 1 << 20
# The errors of a file that is missing or is something else, and of a disk that cannot read it.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO}


class Damaged(ValueError):
    """A checkpoint is not as it was written; the message says where."""


class _Digest:
    """The SHA-256 of a file as it is read or written, made in threads, since hashing releases the interpreter lock.

    Args:
        size: How many bytes the file has.
        piece: Of how many bytes a piece is, where the sum is that of the pieces' sums; None for one sum of all bytes.
        waiting: How much may wait to be hashed until ``update`` waits, too; 0 for any number of pieces.
    """

    def __init__(self, size: int, piece: int | None, waiting: int = 0) -> None:
        self._size, self._piece = size, piece
        self._hashes = [hashlib.sha256()]
        # A thread takes longer to start than to hash fewer bytes than this. One sum cannot be divided among threads.
        lanes = 0 if size <= _PIECE else 1 if piece is None else LANES
        self._workers = Workers(lanes, waiting)
        self._room = piece or size

    def update(self, data: memoryview, read: Callable[[int, memoryview], None] | None = None, at: int = 0) -> None:
        """Hash the next bytes; where ``read`` is given, after it has read them from the byte ``at`` of the file on."""
        while data:
            if not self._room:
                self._hashes.append(hashlib.sha256())
                self._room = self._piece or self._size
            part = data[: self._room]
            if read is None:
                self._workers.put(len(self._hashes), self._hashes[-1].update, part)
            else:
                self._workers.put(len(self._hashes), _fill, read, at, part, self._hashes[-1])
            self._room -= len(part)
            data, at = data[len(part) :], at + len(part)

    def finish(self) -> str:
        self._workers.finish()
        if self._piece is None:
            return self._hashes[0].hexdigest()
        return hashlib.sha256(b"".join(each.digest() for each in self._hashes)).hexdigest()

    def stop(self) -> None:
        """Wait for the threads."""
        self._workers.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()


def _fill(read: Callable[[int, memoryview], None], at: int, part: memoryview, digest: Any) -> None:
    read(at, part)
    digest.update(part)


class FileContent:
    """The bytes of a safetensors file, in memory that nobody writes to.

    Large JAX arrays on the CPU are not copied: they cannot change, and JAX does not give away memory that NumPy views.
    For a state of 120 MB a copy takes longer than all else for which training waits, because its memory is new.
    """

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        own = {name: leaf.copy() if isinstance(leaf, np.ndarray) else leaf for name, leaf in leaves.items()}
        self._size, pieces = files.serialize(own)
        self._parts: list[memoryview] = []
        small = bytearray()
        for data in pieces:
            if len(data) < _LARGE:  # that of a small state may be memory which its caller shares with NumPy
                small += data
                continue
            self._parts += [memoryview(small), data]
            small = bytearray()
        self._parts.append(memoryview(small))

    def write(self, disk: Disk, path: Path) -> FileDigest:
        """Write the file, and return its size and its sum once it is on the disk."""
        size = self._size
        piece = _PIECE if size > _PIECE else None
        file = disk.create(path)
        try:
            with _Digest(size, piece) as digest:
                for data in self._parts:
                    for at in range(0, len(data), _PIECE):
                        part = data[at : at + _PIECE]
                        digest.update(part)
                        disk.write(file, part)
                disk.sync(file)
                return FileDigest(size, digest.finish(), piece)
        finally:
            disk.close(file)


@contextlib.contextmanager
def reading(name: str) -> Generator[None, None, None]:
    """Raise Damaged with the name of a file for an error that the content of the file causes."""
    try:
        yield
    except (Damaged, ResumeMismatch):
        raise
    except (ValueError, RecursionError) as err:
        raise Damaged(f"{name}: {err}") from err
    except OSError as err:
        if err.errno is not None and err.errno not in _DAMAGE:
            raise
        raise Damaged(f"{name}: {err.strerror or err}") from err


class Source:
    """A file that is read from beginning to end, and hashed as it is read."""

    def __init__(self, disk: Disk, path: Path, record: FileDigest) -> None:
        self._disk, self._record = disk, record
        self._file, self._size = disk.open(path)
        self.left: int = self._size
        self._digest = _Digest(self._size, record.piece, waiting=2)

    def __enter__(self) -> Self:
        if self.left != self._record.size:
            self.__exit__()
            raise ValueError(f"it has {self.left} bytes, and {self._record.size} were written")
        return self

    def __exit__(self, *_: object) -> None:
        self._digest.stop()  # they may still read from the file
        self._disk.close(self._file)

    def take(self, into: memoryview) -> None:
        """Read the next bytes, as many as the memory holds."""
        for at in range(0, len(into), _PIECE):
            piece = into[at : at + _PIECE]
            self._read(self._size - self.left, piece)
            self._digest.update(piece)
            self.left -= len(piece)

    def take_later(self, into: memoryview) -> None:
        """As ``take``, but the bytes are there only when ``finish`` returns: the threads that hash them read them.

        Most of reading is copying into new memory, which takes several times as long as to hash it.
        """
        self._digest.update(into, self._read, self._size - self.left)
        self.left -= len(into)

    def _read(self, at: int, into: memoryview) -> None:
        if self._disk.read_at(self._file, at, into) < len(into):
            raise Short("it ends early")

    def finish(self) -> None:
        """Read what is left, and raise ValueError unless all bytes are those that were written."""
        while self.left:
            self.take(memoryview(bytearray(min(_PIECE, self.left))))
        if self._digest.finish() != self._record.sha256:
            raise ValueError("its bytes are not those that were written: their SHA-256 differs")
