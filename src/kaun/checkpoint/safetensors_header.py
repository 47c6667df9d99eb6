"""The safetensors format: the header that says where each array is, written and read, and the arrays behind it.

A header is never trusted: ``parse`` checks that its entries describe exactly the bytes that follow it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from kaun._kernels import aligned_empty
from kaun._messages import quoted
from kaun.checkpoint import strict_json

__all__ = [
    "CODES",
    "DTYPES",
    "LARGEST",
    "MOST",
    "Memory",
    "Place",
    "Short",
    "Take",
    "UnreadDtype",
    "dtype_of",
    "header",
    "in_order",
    "is_shape",
    "parse",
    "read_array",
    "read_index",
    "read_places",
    "read_safetensors",
    "taker",
]

Take = Callable[[memoryview], None]
"""Fills the memory with the next bytes of a file, and raises ``Short`` if the file has fewer."""


class Short(ValueError):
    """A file has fewer bytes than it had when it was opened."""


class UnreadDtype(ValueError):
    """A sound file has an array of a dtype that NumPy and JAX do not have, such as ``F4``."""


# In the order of the format's own library: the widest dtypes come first, so that each array is aligned.
DTYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
        "F32": np.float32,
        "U32": np.uint32,
        "I32": np.int32,
        "BF16": jnp.bfloat16,
        "F16": np.float16,
        "U16": np.uint16,
        "I16": np.int16,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2": jnp.float8_e5m2,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
# A header is parsed as a whole, in up to ten times its size, so less than the 100 MB of the format's own library. The
# largest models of the hub have 100,000 arrays or so, with 100 bytes for each, and spread them over many files.
LARGEST = 32_000_000  # bytes
MOST = 250_000  # arrays
_TOKENS = 11 * MOST  # an array takes 5 strings and 3 pairs of brackets
_PIECE = 1 << 20
_LARGE = 4 << 20
_BLOCK = 16 << 20
_ALIGNMENT = 64
_LARGEST_NUMBER = 2**48  # of a length or a place; NumPy cannot make an array of a longer axis
_CODE = re.compile(r"[BCFIU][0-9]+(_E[0-9]+M[0-9]+(FN|FNU|FNUZ)?)?")  # what the format may call a dtype
CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(DTYPES)}


class Place(NamedTuple):
    """Where an array of a file is.

    Attributes:
        name: The array's name.
        dtype: Its dtype.
        shape: Its shape.
        start: Where its bytes begin, counted from the end of the header.
        stop: Where they end.
        kind: What kind of leaf was saved as this array; None for an array.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int
    kind: str | None


def in_order(arrays: Mapping[str, Any]) -> list[str]:
    """The names of arrays in the order in which a file holds them."""
    # The format's own library, written in Rust, orders strings by their bytes.
    return sorted(arrays, key=lambda name: (_RANKS[CODES[arrays[name].dtype]], name.encode()))


def header(arrays: Mapping[str, Any], note: tuple[str, str], where: str) -> bytes:
    """All that comes before the arrays' bytes; the same bytes as the format's own library writes.

    Args:
        arrays: The arrays by name, of which dtype and shape are read.
        note: The entry of metadata, a name and a text.
        where: The function that was called, for messages.
    """
    # One entry of metadata: the format's own library writes several in an arbitrary order, and equal trees should give
    # equal files.
    entries: dict[str, Any] = {"__metadata__": dict([note])}
    start = 0
    for name in in_order(arrays):
        array = arrays[name]
        size = math.prod(array.shape) * array.dtype.itemsize
        entries[name] = {
            "dtype": CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST or len(arrays) > MOST:
        raise ValueError(
            f"{where}: {len(arrays)} arrays, whose names and shapes take {len(text)} bytes, are too many for "
            f"one file: at most {MOST} arrays and {LARGEST} bytes are read again. Save several files, or stack arrays "
            "of one shape."
        )
    return len(text).to_bytes(8, "little") + text


def taker(file: BinaryIO) -> tuple[Take, int]:
    """A function that reads the next bytes of an open file, and the size of the file."""

    def take(into: memoryview) -> None:
        if file.readinto(into) < len(into):  # pyright: ignore[reportAttributeAccessIssue]
            raise Short("it ends early")

    return take, os.fstat(file.fileno()).st_size


def read_safetensors(file: BinaryIO) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an open file by name, each in its own memory.

    Raises:
        ValueError: If the file is damaged or is not a safetensors file; the message says where.
    """
    take, size = taker(file)
    places, memory = read_places(take, size), Memory(size)
    return {place.name: read_array(take, place, memory) for place in places}


def read_index(path: Path) -> dict[str, Any]:
    """The object of an index, which names arrays and their files; bounded as a header is.

    Raises:
        ValueError: If it is not a JSON object, or too large.
    """
    return _object(lambda: strict_json.load(path, LARGEST, _TOKENS), "its text")


def read_places(take: Take, size: int) -> list[Place]:
    """The arrays that a file's header names, in the order of the file; the header must be the first thing read.

    Args:
        take: Reads the next bytes of the file.
        size: How many bytes the file has.

    Raises:
        ValueError: As ``parse``, and if the header does not fit into the file.
    """
    length = bytearray(min(8, size))
    take(memoryview(length))
    claimed = int.from_bytes(length, "little")
    if size < 8 or claimed > size - 8:
        raise ValueError(f"it has {size} bytes, and its header would need {8 + claimed}")
    if claimed > LARGEST:
        raise ValueError(f"its header has {claimed} bytes, and at most {LARGEST} are read")
    text = bytearray(claimed)
    take(memoryview(text))
    return parse(bytes(text), size - 8 - claimed)


class Memory:
    """Memory for the arrays of a file, in which XLA:CPU reads them in place.

    NumPy asks the system for large pages where an array has 4 MiB or more. Without them half of the time in which
    120 MB are read is that of page faults, so smaller arrays share blocks of 16 MiB. An array that is kept keeps its
    block.

    Args:
        size: How many bytes the file has. Those of a small one share nothing.
    """

    def __init__(self, size: int) -> None:
        self._shared = size >= _BLOCK
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray[Any, Any]:
        """Memory for an array of so many bytes."""
        if size >= _LARGE or not self._shared:
            return aligned_empty((size,), np.uint8)
        if size > self._block.size:
            self._block = aligned_empty((_BLOCK,), np.uint8)
        taken, self._block = self._block[:size], self._block[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return taken


def read_array(take: Take, place: Place, memory: Memory) -> np.ndarray[Any, Any]:
    """The next array of a file."""
    raw = memory.take(place.stop - place.start)
    try:
        take(raw.data)
    except Short:
        raise Short(f"it ends within {quoted(place.name)}") from None
    return raw.view(place.dtype).reshape(place.shape)


def parse(text: bytes, size: int) -> list[Place]:
    """The arrays that a header names, in the order of the file.

    Args:
        text: The header, without its length in front.
        size: How many bytes follow it.

    Raises:
        ValueError: If the arrays are not exactly what follows, one after the other without gaps, each as long as its
            shape and dtype say. Therefore no header can ask for more memory than the file has bytes.
    """
    entries = _loads(text, "its header")
    kinds = _kinds(entries.pop("__metadata__", None))
    places = [_place(name, entry, kinds.pop(name, None)) for name, entry in entries.items()]
    if kinds:
        listed = ", ".join(map(quoted, sorted(kinds)[:5]))
        raise ValueError(f"it describes leaves that it does not hold, [{listed}]")
    places.sort(key=lambda place: (place.start, place.stop))
    at = 0
    for place in places:
        if place.start != at:
            raise ValueError(f"{quoted(place.name)} begins at byte {place.start} of the arrays, and {at} comes next")
        at = place.stop
    if at != size:
        raise ValueError(f"its arrays need {at} bytes, and it has {size} for them")
    return places


def _kinds(metadata: Any) -> dict[str, str]:
    """The kinds of the leaves that are not arrays, by name. Other programs write none, but other metadata."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"'__metadata__' must be a JSON object of strings, and is {quoted(metadata)}")
    kinds = _loads(metadata.get("kaun", "{}").encode(), "kaun's entry in '__metadata__'")
    if not all(isinstance(kind, str) for kind in kinds.values()):
        raise ValueError(f"kaun's entry in '__metadata__' must hold strings, and is {quoted(kinds)}")
    return kinds


def _loads(text: bytes, what: str) -> dict[str, Any]:
    return _object(lambda: strict_json.loads(text, LARGEST, _TOKENS), what)


def _object(read: Callable[[], Any], what: str) -> dict[str, Any]:
    try:
        value = read()
    except strict_json.TooLarge as err:
        raise ValueError(f"{what} is too large: {err}") from err
    except ValueError as err:
        raise ValueError(f"{what} is not valid JSON: {err}") from err
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, and is {quoted(value)}")
    return value


def _place(name: str, entry: Any, kind: str | None) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        expected = "a JSON object of dtype, shape and data_offsets"
        raise ValueError(f"{quoted(name)} must be {expected} in its header, and is {quoted(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = dtype_of(name, code)
    if not (is_shape(shape) and _whole(offsets) and len(offsets) == 2):
        raise ValueError(f"{quoted(name)} has the shape {quoted(shape)} and the data_offsets {quoted(offsets)}")
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{quoted(name)} is {dtype.name}{quoted(shape)} and has {stop - start} bytes")
    return Place(name, dtype, tuple(shape), start, stop, kind)


def dtype_of(name: str, code: Any) -> np.dtype[Any]:
    """The dtype of an array, from the JSON value of a header.

    Raises:
        UnreadDtype: If it is another one of the format.
        ValueError: If it is none.
    """
    if not isinstance(code, str) or code not in DTYPES:
        error = UnreadDtype if isinstance(code, str) and _CODE.fullmatch(code) else ValueError
        raise error(f"{quoted(name)} is of dtype {quoted(code)}; kaun reads {', '.join(DTYPES)}")
    return DTYPES[code]


def is_shape(value: Any) -> bool:
    """Whether a JSON value is the shape of an array."""
    return _whole(value) and len(value) <= 64


def _whole(numbers: Any) -> bool:
    return type(numbers) is list and all(type(n) is int and 0 <= n < _LARGEST_NUMBER for n in numbers)
