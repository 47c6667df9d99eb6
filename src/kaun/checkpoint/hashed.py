"""Files with checksums: hashed as they are written, and read only as they were written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import zlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from kaun._messages import quoted
from kaun.checkpoint import files
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.manifest import FileDigest
from kaun.checkpoint.safetensors_header import Short, read_places
from kaun.checkpoint.workers import MOST, Workers
from kaun.errors import ResumeMismatch

__all__ = ["Damaged", "FileContent", "Source", "reading"]

Act = Callable[[Any, int, int], None]

_PIECE = 4 << 20
_LARGE = 1 << 20
_SCRATCH = 1 << 20
_LISTED = 5
# The errors of a file that is missing or is something else, and of a disk that cannot read it.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO}


class Damaged(ValueError):
    """A checkpoint is not as it was written; the message says where."""


class _Crc32:
    """The CRC-32 of bytes, with the methods of a hash of ``hashlib``.

    Of 120 MB it takes 28 ms of CPU time, and SHA-256 67 ms. Sums of words by NumPy would take 4 ms, but miss, for
    example, the same bit flipped in two words; a CRC-32 finds each two flipped bits of a piece.
    """

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


class _Digest:
    """The sums of a file's pieces as it is read or written, made in threads: both hashes release the interpreter lock.

    Args:
        size: How many bytes the file has.
        piece: Of how many bytes a piece is; None for one sum of all bytes.
        make: Makes a hash for each piece.
        threads: How many threads hash.
    """

    def __init__(self, size: int, piece: int | None, make: Callable[[], Any], threads: int) -> None:
        self._piece, self._make = piece or size, make
        self._sums: list[bytes] = []
        # A thread takes longer to start than to hash fewer bytes than this. One sum cannot be divided among threads.
        self._workers = Workers(threads if piece and size > _PIECE else 0)
        self._parts: list[tuple[Act, int, int]] = []  # of the piece that is not complete
        self._room = self._piece

    def update(self, data: memoryview) -> None:
        """Hash the next bytes."""
        self.add(len(data), lambda digest, start, stop: digest.update(data[start:stop]))

    def add(self, size: int, act: Act) -> None:
        """Hash so many next bytes: ``act(digest, start, stop)`` updates the hash of a piece with a part of them."""
        start = 0
        while start < size:
            stop = min(size, start + self._room)
            self._parts.append((act, start, stop))
            self._room -= stop - start
            start = stop
            if not self._room:
                self._put()

    def _put(self) -> None:
        number, parts = len(self._sums), self._parts
        self._sums.append(b"")
        self._parts, self._room = [], self._piece

        def hash_piece() -> None:
            digest = self._make()
            for act, start, stop in parts:
                act(digest, start, stop)
            self._sums[number] = digest.digest()

        self._workers.put(hash_piece)

    def finish(self) -> list[bytes]:
        """The sums of the pieces, once all are hashed."""
        if self._parts:
            self._put()
        self._workers.finish()
        return self._sums

    def stop(self) -> None:
        """Wait for the threads."""
        self._workers.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()


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

    def write(self, disk: Disk, file: int) -> FileDigest:
        """Write the bytes to an open file, and return their number and sums. They need not be on the disk yet."""
        large = self._size > _PIECE
        # One thread hashes while this one writes and the program trains: it hashes 4 GB a second, as fast as this one
        # writes to the system's memory.
        with _Digest(self._size, _PIECE if large else None, _Crc32 if large else hashlib.sha256, 1) as digest:
            for data in self._parts:
                for at in range(0, len(data), _PIECE):
                    part = data[at : at + _PIECE]
                    digest.update(part)
                    disk.write(file, part)
            sums = b"".join(digest.finish()).hex()
        return FileDigest(self._size, piece=_PIECE, crc32=sums) if large else FileDigest(self._size, sums)


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
        make = hashlib.sha256 if record.crc32 is None else _Crc32
        self._digest = _Digest(self._size, record.piece, make, MOST)

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
        self._read(self._size - self.left, into)
        self._digest.update(into)
        self.left -= len(into)

    def take_later(self, into: memoryview) -> None:
        """As ``take``, but the bytes are there only when ``finish`` returns: the threads that hash them read them.

        Much of reading is copying into new memory, which takes as long as to hash it.
        """
        at = self._size - self.left

        def read(digest: Any, start: int, stop: int) -> None:
            self._read(at + start, into[start:stop])
            digest.update(into[start:stop])

        self._digest.add(len(into), read)
        self.left -= len(into)

    def skip(self, size: int) -> None:
        """As ``take_later``, but the bytes are only hashed, in little memory that stays in the processor's cache."""
        at = self._size - self.left

        def read(digest: Any, start: int, stop: int) -> None:
            memory = memoryview(bytearray(min(_SCRATCH, stop - start)))
            for place in range(start, stop, _SCRATCH):
                part = memory[: stop - place]
                self._read(at + place, part)
                digest.update(part)

        self._digest.add(size, read)
        self.left -= size

    def _read(self, at: int, into: memoryview) -> None:
        if self._disk.read_at(self._file, at, into) < len(into):
            raise Short("it ends early")

    def finish(self) -> None:
        """Read what is left, and raise ValueError unless all bytes are those that were written."""
        self.skip(self.left)
        sums, record = self._digest.finish(), self._record
        if record.piece is None or record.crc32 is None:
            found = sums[0] if record.piece is None else hashlib.sha256(b"".join(sums)).digest()
            if found.hex() != record.sha256:
                raise ValueError("its bytes are not those that were written: their SHA-256 differs")
            return
        wrong = {i for i, found in enumerate(sums) if found.hex() != record.crc32[8 * i : 8 * i + 8]}
        if wrong:
            where = self._describe(wrong, record.piece)
            raise ValueError(f"its bytes are not those that were written: their CRC-32 differs in {where}")

    def _describe(self, wrong: set[int], size: int) -> str:
        """What lies in some pieces, each of this size, by the file's header where that can be read."""
        at = 0

        def take(into: memoryview) -> None:
            nonlocal at
            self._read(at, into)
            at += len(into)

        try:
            places = read_places(take, self._size)
        except ValueError:
            return "its header"
        parts = [("its header", 0, at), *((quoted(p.name), at + p.start, at + p.stop) for p in places)]
        found = [what for what, a, b in parts if a < b and not wrong.isdisjoint(range(a // size, -(-b // size)))]
        more = [f"{len(found) - _LISTED} more"] if len(found) > _LISTED else []
        return " or ".join([", ".join(found[:_LISTED]), *more])
