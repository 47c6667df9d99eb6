"""One checkpoint: a folder of two or three files with checksums, of which nothing is used before it is verified."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import queue
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np

from kaun.checkpoint import files, manifest, strict_json
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.manifest import FileDigest, Manifest
from kaun.checkpoint.safetensors_header import Place, Short, read_places
from kaun.errors import ResumeMismatch
from kaun.layers.core import Vars
from kaun.state import TrainState
from kaun.tree import flatten, is_array

__all__ = [
    "MANIFEST", "REPORTS", "STATE", "Damaged", "Draft", "Manifest", "OtherLeaves", "Saved", "leaves", "read",
    "read_manifest", "read_vars", "verify",
]  # fmt: skip

T = TypeVar("T")

STATE, REPORTS = manifest.FILES
MANIFEST = "manifest.json"
_VARS, _OPT_STATE = "vars.", "opt_state"  # the names of their leaves in the state begin with these
_PIECE = 4 << 20
# The errors of a file that is missing or is something else, and of a disk that cannot read it.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO}


class Damaged(ValueError):
    """A checkpoint is not as it was written; the message says where."""


class OtherLeaves(ResumeMismatch):
    """The leaves of a checkpoint are not those of the template; the text is the list of differences.

    Attributes:
        in_opt_state: Whether only those of the optimizer's state differ.
    """

    def __init__(self, differences: files.Differences) -> None:
        super().__init__(differences.listing())
        self.in_opt_state: bool = all(line.startswith(_OPT_STATE) for line in differences.lines)


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: The run's step.
        state: The state.
        reports: Arrays and JSON values that reports keep, by name.
        facts: By what the run is recognized, by name.
    """

    step: int
    state: TrainState
    reports: dict[str, Any]
    facts: dict[str, Any]


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


class _FileContent:
    """The bytes of a safetensors file, copied to memory that nothing else writes to."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        pieces = files.serialize(leaves)
        self._data = np.empty(sum(map(len, pieces)), np.uint8)
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


class Draft:
    """A checkpoint in memory, ready to be written. All arrays are copied, so the arguments may change afterwards.

    Args:
        step: The run's step.
        state: The state.
        reports: Arrays (which come back as NumPy's), floats, and JSON values, by name.
        facts: JSON values, by name.

    Raises:
        TypeError: If neither JSON nor a safetensors file can hold a value.
        ValueError: If they cannot hold it, or all that is not an array takes more than 16 MB.
    """

    def __init__(self, step: int, state: TrainState, reports: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        held = {name: v for name, v in reports.items() if is_array(v) or (type(v) is float and not np.isfinite(v))}
        values = {name: value for name, value in reports.items() if name not in held}
        self.step = step
        self._text = (
            f'"reports":{strict_json.dumps(values, "reports")},"facts":{strict_json.dumps(dict(facts), "facts")}'
        )
        if len(self._text) > strict_json.LARGEST - 1000:
            raise ValueError(
                f"the reports' values and the facts of a checkpoint take {len(self._text)} bytes as JSON, and at most "
                f"{strict_json.LARGEST >> 20} MB can be stored. Keep arrays instead: np.asarray(values)."
            )
        self._files = {STATE: _FileContent(flatten(state)[0])}
        if held:
            self._files[REPORTS] = _FileContent(held)

    def write(self, disk: Disk, folder: Path) -> None:
        """Make the folder and its files, and wait until they are on the disk."""
        disk.make_folder(folder)
        records = {name: file.write(disk, folder / name) for name, file in self._files.items()}
        file = disk.create(folder / MANIFEST)
        try:
            disk.write(file, memoryview(manifest.sealed(self.step, records, self._text)))
            disk.sync(file)
        finally:
            disk.close(file)
        disk.sync_folder(folder)


@contextlib.contextmanager
def _reading(name: str) -> Generator[None, None, None]:
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


class _Source:
    """A file that is read from beginning to end, and hashed as it is read."""

    def __init__(self, disk: Disk, path: Path, record: FileDigest) -> None:
        self._disk, self._record = disk, record
        self._file, size = disk.open(path)
        self.left = size
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


def verify(disk: Disk, folder: Path, step: int) -> Manifest:
    """Read every byte of a checkpoint, check it, and return the manifest.

    Raises:
        Damaged: If a byte is not as it was written.
        ResumeMismatch: If a newer version of kaun wrote the checkpoint.
    """
    about = read_manifest(disk, folder, step)
    for name, record in about.files.items():
        with _reading(name), _Source(disk, folder / name, record) as source:
            source.finish()
    return about


def leaves(disk: Disk, folder: Path, step: int) -> tuple[Manifest, dict[str, list[Place]]]:
    """Verify a checkpoint, and return its manifest and the arrays in each of its files."""
    about = read_manifest(disk, folder, step)
    found: dict[str, list[Place]] = {}
    for name, record in about.files.items():
        with _reading(name), _Source(disk, folder / name, record) as source:
            found[name] = read_places(source.take, source.left)
            source.finish()
    return about, found


def read_manifest(disk: Disk, folder: Path, step: int) -> Manifest:
    """Verify and return the manifest of a checkpoint; its other files are not read.

    Raises:
        Damaged: If a byte of it is not as it was written.
        ResumeMismatch: If a newer version of kaun wrote the checkpoint.
    """
    if folder.is_symlink():
        raise Damaged("it is a link and not a folder")
    with _reading(MANIFEST):
        return manifest.read(disk, folder / MANIFEST, step)


def read(disk: Disk, folder: Path, step: int, like: TrainState) -> Saved:
    """Verify and return a checkpoint in the structure of ``like``; see ``checkpoint.load`` for what a template is.

    Raises:
        Damaged: If a byte is not as it was written; nothing of the checkpoint was used.
        OtherLeaves: If the leaves, shapes and dtypes are not those of ``like``.
    """
    about = read_manifest(disk, folder, step)
    state = _read_tree(disk, folder, about, like)
    reports = dict(about.reports)
    if REPORTS in about.files:
        with _reading(REPORTS):
            reports |= _leaves(disk, folder / REPORTS, about.files[REPORTS])[0]
    return Saved(step, state, reports, about.facts)


def read_vars(disk: Disk, folder: Path, step: int, like: Vars) -> Vars:
    """Verify a checkpoint, and return its variables alone; no array is made of the other leaves.

    Raises:
        Damaged: If a byte of the manifest or of the state's file is not as it was written.
        OtherLeaves: If the leaves, shapes and dtypes of the variables are not those of ``like``.
    """
    return _read_tree(disk, folder, read_manifest(disk, folder, step), like, _VARS)


def _read_tree(disk: Disk, folder: Path, about: Manifest, like: T, start: str = "") -> T:
    """The leaves of the state whose names have this start, in the structure of a template."""
    leaves, structure = flatten(like)
    wanted = {start + name: leaf for name, leaf in leaves.items()}
    files.check_template(wanted)
    with _reading(STATE):
        found, differences = _leaves(disk, folder / STATE, about.files[STATE], wanted, start)
    if differences.lines:
        raise OtherLeaves(differences)
    return jax.tree.unflatten(structure, [files.restore(name, found.pop(name), leaf) for name, leaf in wanted.items()])


def _leaves(
    disk: Disk, path: Path, record: FileDigest, wanted: Mapping[str, Any] | None = None, start: str = ""
) -> tuple[dict[str, Any], files.Differences]:
    """Verify a file, and return its leaves whose names have this start, and how they differ from the template."""
    with _Source(disk, path, record) as source:
        arrays, differences = files.read_arrays(source.take, source.left, wanted, start=start)
        source.finish()  # before anything is used, and also where leaves differ: the header may be what is damaged
    return {place.name: files.decode(place, array) for place, array in arrays}, differences
