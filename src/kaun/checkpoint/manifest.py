"""The manifest of a checkpoint: its files with their checksums, all that is not an array, and its own checksum."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kaun.checkpoint import strict_json
from kaun.checkpoint.disk import Disk
from kaun.errors import ResumeMismatch

__all__ = ["FILES", "VERSION", "FileDigest", "Manifest", "read", "sealed"]

VERSION = 1
FILES = ("state.safetensors", "reports.safetensors")  # the second only if reports keep arrays
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_END = b'"}\n'


class FileDigest(NamedTuple):
    """The size of a file in bytes, and its SHA-256."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """What a manifest says.

    Attributes:
        step: The run's step.
        files: The files of the checkpoint, by name.
        reports: What reports keep and is not an array, by name.
        facts: By what the run is recognized, by name.
    """

    step: int
    files: dict[str, FileDigest]
    reports: dict[str, Any]
    facts: dict[str, Any]


def sealed(step: int, files: Mapping[str, FileDigest], text: str) -> bytes:
    """The bytes of a manifest.

    Args:
        step: The run's step.
        files: The files that were written, by name.
        text: The entries of ``reports`` and ``facts``, as JSON without the braces around them.
    """
    records = {name: record._asdict() for name, record in files.items()}
    about = strict_json.dumps({"kaun": VERSION, "step": step, "files": records}, "manifest")
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
    found = _checked(strict_json.loads(bytes(raw)))
    if found.step != step:
        raise ValueError(f"it is of step {found.step}, in a folder of step {step}")
    return found


def _checked(found: Any) -> Manifest:
    if not isinstance(found, dict) or type(found.get("kaun")) is not int or found["kaun"] < 1:
        raise ValueError("it is not a manifest of kaun")
    if found["kaun"] > VERSION:
        raise ResumeMismatch(
            f"a checkpoint of format {found['kaun']} was written by a newer kaun than this one, which reads format "
            f"{VERSION}. Install the newer one."
        )
    if found.keys() != {"kaun", "step", "files", "reports", "facts", "sha256"} or type(found["step"]) is not int:
        raise ValueError("its entries are not those of a manifest")
    records, reports, facts = found["files"], found["reports"], found["facts"]
    if not (isinstance(records, dict) and isinstance(reports, dict) and isinstance(facts, dict)):
        raise ValueError("its entries are not those of a manifest")
    if FILES[0] not in records or not records.keys() <= set(FILES) or not all(map(_is_record, records.values())):
        raise ValueError("its entries of files are not those of a manifest")
    return Manifest(found["step"], {name: FileDigest(**record) for name, record in records.items()}, reports, facts)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != {"size", "sha256"}:
        return False
    size, digest = record["size"], record["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None
