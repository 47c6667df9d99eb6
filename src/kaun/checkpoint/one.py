"""One checkpoint: a folder of two or three files, written so that every byte can be verified, and read only then."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from kaun.checkpoint import files, manifest, safetensors_header, strict_json
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.manifest import Manifest, Record
from kaun.errors import ResumeMismatch
from kaun.state import TrainState
from kaun.tree import flatten, is_array

__all__ = ["MANIFEST", "REPORTS", "STATE", "Damaged", "Draft", "Manifest", "Saved", "leaves", "read", "verify"]

STATE, REPORTS = manifest.FILES
MANIFEST = "manifest.json"
_PIECE = 4 << 20
# What reading says when a file is gone or something else is in its place, or when the disk cannot read it any more.
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO}
_ALIGNED = 64  # JAX takes memory of the CPU as it is when it is aligned so, and copies it when not


class Damaged(ValueError):
    """A checkpoint is not what was written; the message says where."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: TrainState
    reports: dict[str, Any]
    facts: dict[str, Any]


class _Digest:
    """The SHA-256 of what is read or written, on a thread of its own: hashing lets go of the interpreter meanwhile."""

    def __init__(self, size: int, waiting: int = 0) -> None:
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[memoryview | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="kaun-sha256", daemon=True)
        # Of less than this a thread takes longer to start than to do the work.
        self._apart = size > _PIECE
        if self._apart:
            self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self._hash.update(data)

    def update(self, data: memoryview) -> None:
        if self._apart:
            self._queue.put(data)
        else:
            self._hash.update(data)

    def finish(self) -> str:
        if self._apart:
            self._queue.put(None)
            self._thread.join()
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._queue.put(None)


class _Packed:
    """Leaves as the bytes of a safetensors file, copied to memory that nothing else writes to."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                leaf.copy_to_host_async()
        encoded = {name: files.encode(name, leaf) for name, leaf in leaves.items()}
        arrays = {name: array for name, (array, _) in encoded.items()}
        self.header = safetensors_header.header(arrays, {name: kind for name, (_, kind) in encoded.items() if kind})
        self.data = np.empty(sum(array.nbytes for array in arrays.values()), np.uint8)
        at = 0
        for name in safetensors_header.in_order(arrays):
            raw = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
            self.data[at : at + raw.size] = raw
            at += raw.size

    def write(self, disk: Disk, path: Path) -> Record:
        size = len(self.header) + self.data.size
        pieces = [memoryview(self.header)]
        pieces += [self.data[at : at + _PIECE].data for at in range(0, self.data.size, _PIECE)]
        file = disk.create(path)
        try:
            with _Digest(size) as digest:
                for piece in pieces:
                    digest.update(piece)
                    disk.write(file, piece)
                disk.sync(file)
                return Record(size, digest.finish())
        finally:
            disk.close(file)


class Draft:
    """A checkpoint as it was when this was made, whatever becomes of the arguments: the copy from device to host.

    Arguments:
        step: the run's step.
        state: the state.
        reports: arrays, which come back as NumPy's, floats, and JSON values, by name.
        facts: a JSON value.

    Raises:
        TypeError: for what JSON or a safetensors file cannot hold as it is.
        ValueError: likewise, and when all that is not an array takes more than 16 MB.
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
                f"the reports' values and the facts of a checkpoint take {len(self._text)} bytes as JSON, at most "
                f"{strict_json.LARGEST >> 20} MB are stored. Give arrays: np.asarray(values)."
            )
        self._files = {STATE: _Packed(flatten(state)[0])}
        if held:
            self._files[REPORTS] = _Packed(held)

    def write(self, disk: Disk, folder: Path) -> None:
        """Makes the folder; when this comes back, all that is in it is on the disk."""
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
    """Says of which file it was that reading failed, where that is the file's fault."""
    try:
        yield
    except (Damaged, ResumeMismatch):
        raise
    except (ValueError, RecursionError) as err:
        raise Damaged(f"{name}: {err}") from err
    except OSError as err:
        if err.errno is not None and err.errno not in _GONE:
            raise
        raise Damaged(f"{name}: {err.strerror or err}") from err


class _Source:
    """A file that is read from one end to the other and hashed meanwhile."""

    def __init__(self, disk: Disk, path: Path, record: Record) -> None:
        self._disk, self._record = disk, record
        self._file, size = disk.open(path)
        self.left = size
        self._digest = _Digest(size, waiting=8)

    def __enter__(self) -> Self:
        if self.left != self._record.size:
            self.__exit__()
            raise ValueError(f"it is {self.left} bytes long, and {self._record.size} were written")
        return self

    def __exit__(self, *_: object) -> None:
        self._digest.__exit__()
        self._disk.close(self._file)

    def take(self, into: memoryview) -> None:
        """Reads the next bytes, as many as the memory holds."""
        for at in range(0, len(into), _PIECE):
            piece = into[at : at + _PIECE]
            if self._disk.read(self._file, piece) < len(piece):
                raise ValueError("it ended early")
            self._digest.update(piece)
        self.left -= len(into)

    def places(self) -> list[safetensors_header.Place]:
        """What the header says, which must be the first thing read."""
        length = bytearray(8)
        if self.left < 8:
            raise ValueError("it has no header")
        self.take(memoryview(length))
        size = int.from_bytes(length, "little")
        if size > min(self.left, safetensors_header.LARGEST):
            raise ValueError(f"its header claims {size} bytes, and {self.left} are there")
        text = bytearray(size)
        self.take(memoryview(text))
        return safetensors_header.parse(bytes(text), self.left)

    def array(self, place: safetensors_header.Place) -> np.ndarray[Any, Any]:
        """The next array of the file, in memory of its own."""
        size = place.stop - place.start
        memory = np.empty(size + _ALIGNED, np.uint8)
        start = -memory.ctypes.data % _ALIGNED
        raw = memory[start : start + size]
        self.take(raw.data)
        return raw.view(place.dtype).reshape(place.shape)

    def finish(self) -> None:
        """Reads what is left, and raises ValueError unless all bytes are those that were written."""
        while self.left:
            self.take(memoryview(bytearray(min(_PIECE, self.left))))
        if self._digest.finish() != self._record.sha256:
            raise ValueError("its bytes are not those that were written, their SHA-256 is another")


def verify(disk: Disk, folder: Path, step: int) -> Manifest:
    """The manifest of a checkpoint of which every byte was read and is as it was written.

    Raises:
        Damaged: when it is not.
        ResumeMismatch: when a newer kaun wrote it.
    """
    about = _open(disk, folder, step)
    for name, record in about.files.items():
        with _reading(name), _Source(disk, folder / name, record) as source:
            source.finish()
    return about


def leaves(disk: Disk, folder: Path, step: int) -> tuple[Manifest, dict[str, list[safetensors_header.Place]]]:
    """The manifest of a checkpoint that verifies, and what is in each of its files."""
    about = _open(disk, folder, step)
    found: dict[str, list[safetensors_header.Place]] = {}
    for name, record in about.files.items():
        with _reading(name), _Source(disk, folder / name, record) as source:
            found[name] = source.places()
            source.finish()
    return about, found


def _open(disk: Disk, folder: Path, step: int) -> Manifest:
    if folder.is_symlink():
        raise Damaged("it is a link, and no folder")
    with _reading(MANIFEST):
        return manifest.read(disk, folder / MANIFEST, step)


def read(disk: Disk, folder: Path, step: int, like: TrainState) -> Saved:
    """A checkpoint in the structure of ``like``; see ``checkpoint.load`` for what a template is.

    Raises:
        Damaged: when any byte is not as it was written. Nothing of it was used.
        ResumeMismatch: when it is sound, but not of the leaves, shapes and dtypes of ``like``; its text begins with
            the listing.
    """
    wanted, structure = flatten(like)
    files.check_template(wanted)
    about = _open(disk, folder, step)
    with _reading(STATE):
        found, lines = _state(disk, folder / STATE, about.files[STATE], wanted)
    if lines:
        raise ResumeMismatch(lines)
    state = jax.tree.unflatten(structure, [files.restore(name, found.pop(name), leaf) for name, leaf in wanted.items()])
    reports = dict(about.reports)
    if REPORTS in about.files:
        with _reading(REPORTS), _Source(disk, folder / REPORTS, about.files[REPORTS]) as source:
            places = source.places()
            _check(places, _keys(wanted))
            held = [(place, source.array(place)) for place in places]
            source.finish()
            reports |= {place.name: files.decode(place.name, array, place.kind) for place, array in held}
    return Saved(step, state, reports, about.facts)


def _state(disk: Disk, path: Path, record: Record, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The leaves of a state's file, or a listing of those that are not as wanted."""
    with _Source(disk, path, record) as source:
        places = source.places()
        _check(places, _keys(wanted))
        found = {place.name: _shape(place) for place in places}
        lines, too_wide = files.mismatches(wanted, found)
        if lines:
            source.finish()  # for a damaged header may look like another model's
            return {}, files.listing(lines) + (f"\n{files.WIDER}" if too_wide else "")
        arrays = [source.array(place) for place in places]
        source.finish()
    return {p.name: files.decode(p.name, array, p.kind) for p, array in zip(places, arrays, strict=True)}, ""


def _keys(wanted: Mapping[str, Any]) -> dict[str, int]:
    """The kinds of keys that may be read, and how many words each has: JAX's own, and those of the template."""
    keys = [leaf for leaf in wanted.values() if isinstance(leaf, jax.Array) and files.is_key(leaf)]
    words = {"key threefry2x32": 2, "key rbg": 4, "key unsafe_rbg": 4}
    return words | {f"key {jax.random.key_impl(key)}": jax.random.key_data(key).shape[-1] for key in keys}


def _check(places: Sequence[safetensors_header.Place], keys: Mapping[str, int]) -> None:
    """Raises ValueError for an array that is not what its mark says; no other name of a file reaches JAX."""
    for place in places:
        stored = files.STORED.get(place.kind or "")
        if place.kind is None or (stored == place.dtype and place.shape == ()):
            continue
        if place.dtype != np.uint32 or place.shape[-1:] != (keys.get(place.kind),):
            what = f"{place.dtype.name}{list(place.shape)}"
            raise ValueError(f"leaf {place.name[:80]!r} is marked as {place.kind[:80]!r} and holds {what}")


def _shape(place: safetensors_header.Place) -> Any:
    """What ``decode`` will make of an array, without its numbers."""
    plain = jax.ShapeDtypeStruct(place.shape, place.dtype)
    kind = place.kind
    if kind is None:
        return plain
    if kind in files.STORED:
        return files.decode(place.name, np.zeros((), place.dtype), kind)
    return jax.eval_shape(lambda words: jax.random.wrap_key_data(words, impl=kind.removeprefix("key ")), plain)
