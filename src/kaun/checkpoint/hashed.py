"""Files with checksums: hashed as they are written, and read only as they were written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import queue
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from kaun.checkpoint import files
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.manifest import FileDigest
from kaun.checkpoint.safetensors_header import Short
from kaun.errors import ResumeMismatch

__all__ = ["Damaged", "FileContent", "Source", "reading"]

_PIECE = 4 << 20
# The errors of a file that is missing or is something else, and of a disk that cannot read it.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO}


class Damaged(ValueError):
    """A checkpoint is not as it was written; the message says where."""


class _Digest:
    """The SHA-256 of bytes as they are read or written, in a thread, since hashing releases the interpreter lock."""

    def __init__(self, size: int, waiting: int = 0) -> None:
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[memoryview | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="kaun-sha256", daemon=True)
        # A thread takes longer to start than to hash fewer bytes than this.
        self._threaded = size > _PIECE
        if self._threaded:
            self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self._hash.update(data)

    def update(self, data: memoryview) -> None:
        if self._threaded:
            self._queue.put(data)
        else:
            self._hash.update(data)

    def finish(self) -> str:
        if self._threaded:
            self._queue.put(None)
            self._thread.join()
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._queue.put(None)


class FileContent:
    """The bytes of a safetensors file, copied to memory that nothing else writes to."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        size, pieces = files.serialize(leaves)
        self._data = np.empty(size, np.uint8)
        at = 0
        for piece in pieces:
            self._data[at : at + len(piece)] = piece
            at += len(piece)

    def write(self, disk: Disk, path: Path) -> FileDigest:
        """Write the file, and return its size and its sum once it is on the disk."""
        size = self._data.size
        file = disk.create(path)
        try:
            with _Digest(size) as digest:
                for at in range(0, size, _PIECE):
                    piece = self._data[at : at + _PIECE].data
                    digest.update(piece)
                    disk.write(file, piece)
                disk.sync(file)
                return FileDigest(size, digest.finish())
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
        self._file, size = disk.open(path)
        self.left: int = size
        self._digest = _Digest(size, waiting=8)

    def __enter__(self) -> Self:
        if self.left != self._record.size:
            self.__exit__()
            raise ValueError(f"it has {self.left} bytes, and {self._record.size} were written")
        return self

    def __exit__(self, *_: object) -> None:
        self._digest.__exit__()
        self._disk.close(self._file)

    def take(self, into: memoryview) -> None:
        """Read the next bytes, as many as the memory holds."""
        for at in range(0, len(into), _PIECE):
            piece = into[at : at + _PIECE]
            if self._disk.read(self._file, piece) < len(piece):
                raise Short("it ends early")
            self._digest.update(piece)
        self.left -= len(into)

    def finish(self) -> None:
        """Read what is left, and raise ValueError unless all bytes are those that were written."""
        while self.left:
            self.take(memoryview(bytearray(min(_PIECE, self.left))))
        if self._digest.finish() != self._record.sha256:
            raise ValueError("its bytes are not those that were written: their SHA-256 differs")
