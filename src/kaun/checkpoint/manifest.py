"""The manifest of a checkpoint: its files with their checksums, all that is not an array, and its own checksum."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kaun._messages import quoted
from kaun.checkpoint import strict_json
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.safetensors_header import Place, dtype_of, is_shape
from kaun.errors import ResumeMismatch

__all__ = ["FILES", "VERSION", "FileDigest", "Manifest", "parse", "part_names", "read", "sealed"]

VERSION = 4
_ONE_FILE, _PARTS, _PIECES, _CRC32 = 1, 2, 3, 4
FILES = ("state.safetensors", "reports.safetensors")  # the second only if reports keep arrays
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CRCS = re.compile(r"[0-9a-f]*", re.ASCII)
_END = b'"}\n'
_SMALLEST = 1 << 20  # bytes of a piece: a file has few


class FileDigest(NamedTuple):
    """The size of a file in bytes, and its checksums: its SHA-256, or the CRC-32 of each of its pieces.

    Attributes:
        size: The size.
        sha256: The SHA-256 of all bytes or, with ``piece``, as format 3 has it, of the SHA-256s of the pieces one after
            the other. None where there is ``crc32``.
        piece: How many bytes each piece has, the last one fewer; None where the sum is that of all bytes.
        crc32: The CRC-32 of each piece, eight hexadecimal digits one after the other; else None.
    """

    size: int
    sha256: str | None = None
    piece: int | None = None
    crc32: str | None = None

    def entry(self) -> dict[str, Any]:
        """The entry of the file in a manifest."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Manifest(NamedTuple):
    """What a manifest says.

    Attributes:
        step: The run's step.
        files: The files of the checkpoint, by name.
        reports: What reports keep and is not an array, by name.
        facts: By what the run is recognized, by name.
        leaves: Dtype, shape and kind of the leaves in the parts of a checkpoint of several processes; else None.
    """

    step: int
    files: dict[str, FileDigest]
    reports: dict[str, Any]
    facts: dict[str, Any]
    leaves: dict[str, Place] | None = None


def sealed(step: int, files: Mapping[str, FileDigest], text: str, *, parts: bool = False) -> bytes:
    """The bytes of a manifest.

    Args:
        step: The run's step.
        files: The files that were written, by name.
        text: The entries of ``reports`` and ``facts``, with ``parts`` also of ``leaves``, as JSON without the braces
            around them.
        parts: Whether the files are parts. An earlier kaun reads neither these nor sums of pieces.
    """
    records = {name: record.entry() for name, record in files.items()}
    in_pieces = any(record.crc32 is not None for record in files.values())
    version = _CRC32 if in_pieces else _PARTS if parts else _ONE_FILE
    about = strict_json.dumps({"kaun": version, "step": step, "files": records}, "manifest")
    raw = f'{about[:-1]},{text},"sha256":"'.encode()
    return raw + hashlib.sha256(raw).hexdigest().encode() + _END


def read(disk: Disk, path: Path, step: int) -> Manifest:
    """Read a manifest, and check that every byte is as it was written.

    Raises:
        ValueError: If a byte differs, or the manifest is of another step.
        ResumeMismatch: If a newer kaun wrote it.
    """
    file, size = disk.open(path)
    try:
        if size > strict_json.LARGEST:
            raise ValueError(f"it is {size} bytes long, at most {strict_json.LARGEST} are read")
        raw = bytearray(size)
        if disk.read(file, memoryview(raw)) < size:
            raise ValueError("it ended early")
    finally:
        disk.close(file)
    at = len(raw) - 64 - len(_END)
    start, digest, end = bytes(raw[:at]), bytes(raw[at : at + 64]), bytes(raw[at + 64 :])
    if at < 0 or not start.endswith(b'"sha256":"') or end != _END:
        raise ValueError("it does not end like a manifest")
    if hashlib.sha256(start).hexdigest().encode() != digest:
        raise ValueError("its text is not what was written: its SHA-256 differs from the one at its end")
    found = parse(bytes(raw))
    if found.step != step:
        raise ValueError(f"it is of step {found.step}, in a folder of step {step}")
    return found


def parse(raw: bytes) -> Manifest:
    """What the bytes of a manifest say; their sum is not looked at.

    Raises:
        ValueError: If they say nothing that ``sealed`` writes.
        ResumeMismatch: If a newer kaun wrote it.
    """
    found = strict_json.loads(raw)
    if not isinstance(found, dict) or type(found.get("kaun")) is not int or found["kaun"] < 1:
        raise ValueError("it is not a manifest of kaun")
    if found["kaun"] > VERSION:
        raise ResumeMismatch(
            f"a checkpoint of format {found['kaun']} was written by a newer kaun than this one, which reads formats up "
            f"to {VERSION}. Install the newer one."
        )
    in_parts = found["kaun"] == _PARTS or (found["kaun"] >= _PIECES and "leaves" in found)
    objects = {"files", "reports", "facts"} | ({"leaves"} if in_parts else set())
    if found.keys() != {"kaun", "step", "sha256"} | objects or type(found["step"]) is not int:
        raise ValueError("its entries are not those of a manifest")
    if not all(isinstance(found[name], dict) for name in objects):
        raise ValueError("its entries are not those of a manifest")
    records = found["files"]
    one_file = FILES[0] in records and records.keys() <= set(FILES)
    known = records.keys() == set(part_names(len(records))) if in_parts else one_file
    if not known or not all(_is_record(record, found["kaun"]) for record in records.values()):
        raise ValueError("its entries of files are not those of a manifest")
    files = {name: FileDigest(**record) for name, record in records.items()}
    leaves = _places(found["leaves"]) if in_parts else None
    return Manifest(found["step"], files, found["reports"], found["facts"], leaves)


def part_names(count: int) -> list[str]:
    """The names of the parts that so many processes write."""
    return [f"part-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _is_record(record: Any, version: int) -> bool:
    forms = [{"size", "sha256"}]
    forms += [{"size", "sha256", "piece"}] if version == _PIECES else []
    forms += [{"size", "crc32", "piece"}] if version == _CRC32 else []
    if not isinstance(record, dict) or record.keys() not in forms:
        return False
    size, piece = record["size"], record.get("piece", _SMALLEST)
    if type(size) is not int or size < 0 or type(piece) is not int or piece < _SMALLEST:
        return False
    if "crc32" in record:
        sums = record["crc32"]
        return isinstance(sums, str) and len(sums) == 8 * -(-size // piece) and _CRCS.fullmatch(sums) is not None
    return isinstance(record["sha256"], str) and _DIGEST.fullmatch(record["sha256"]) is not None


def _places(leaves: Mapping[str, Any]) -> dict[str, Place]:
    """The leaves that the entry ``leaves`` names, as arrays that begin at byte 0."""
    found: dict[str, Place] = {}
    for name, entry in leaves.items():
        if not isinstance(entry, dict) or not {"dtype", "shape"} <= entry.keys() <= {"dtype", "shape", "kind"}:
            raise ValueError(f"{quoted(name)} must be a JSON object of dtype and shape, and is {quoted(entry)}")
        kind, shape = entry.get("kind"), entry["shape"]
        if not is_shape(shape) or not isinstance(kind, (str, type(None))):
            raise ValueError(f"{quoted(name)} has the shape {quoted(shape)} and the kind {quoted(kind)}")
        dtype = dtype_of(name, entry["dtype"])
        found[name] = Place(name, dtype, tuple(shape), 0, math.prod(shape) * dtype.itemsize, kind)
    return found
