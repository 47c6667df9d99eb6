"""The layout of a safetensors file: the header that says where each array is, read with every claim checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kaun.checkpoint import strict_json

__all__ = ["DTYPES", "LARGEST", "Place", "header", "in_order", "parse"]

# In the format's own order: files begin with the arrays of the widest, so that each is aligned.
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
LARGEST = 100_000_000  # bytes of a header: the format's own limit
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(DTYPES)}


class Place(NamedTuple):
    """Where an array of a file is, counted from the end of the header, and what kind of leaf it was if not an array."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int
    kind: str | None


def in_order(arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[str]:
    """The names of arrays in the order in which a file holds them."""
    # Rust, which the format's own library is written in, orders strings by their bytes.
    return sorted(arrays, key=lambda name: (_RANKS[_CODES[arrays[name].dtype]], name.encode()))


def header(arrays: Mapping[str, np.ndarray[Any, Any]], kinds: Mapping[str, str]) -> bytes:
    """All that comes before the arrays' bytes, as ``checkpoint.save`` has it written by safetensors' own library."""
    entries: dict[str, Any] = {"__metadata__": {"kaun": json.dumps(dict(kinds))}}
    start = 0
    for name in in_order(arrays):
        array = arrays[name]
        entries[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse(text: bytes, size: int) -> list[Place]:
    """The arrays that a header names, in the order of the file.

    Arguments:
        text: the header, without its length in front.
        size: how many bytes follow it.

    Raises:
        ValueError: unless the arrays are exactly what follows, one after the other without gaps, each as long as its
            shape and dtype say. So no claim asks for more memory than the file has bytes.
    """
    entries = strict_json.loads(text, LARGEST)
    if not isinstance(entries, dict):
        raise ValueError("its header is not an object")
    metadata = entries.pop("__metadata__", {})
    kinds = _kinds(metadata)
    places = sorted((_place(name, entry, kinds.pop(name, None)) for name, entry in entries.items()), key=_position)
    if kinds:
        raise ValueError(f"it describes leaves that it does not hold, {sorted(kinds)[:5]}")
    at = 0
    for place in places:
        if place.start != at or place.stop - at != math.prod(place.shape) * place.dtype.itemsize:
            raise ValueError(f"the place of {place.name[:80]!r} does not fit its shape, or what is beside it")
        at = place.stop
    if at != size:
        raise ValueError(f"its arrays take {at} bytes, and it has {size}")
    return places


def _position(place: Place) -> tuple[int, int]:
    return place.start, place.stop


def _kinds(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("kaun", "{}"), str):
        raise ValueError("the metadata of its header is not what kaun writes")
    kinds = strict_json.loads(metadata.get("kaun", "{}").encode(), LARGEST)
    if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
        raise ValueError("the metadata of its header is not what kaun writes")
    return kinds


def _place(name: str, entry: Any, kind: str | None) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header's entry of {name[:80]!r} is not what the format says")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{name[:80]!r} is of dtype {code!r:.40}, which kaun does not read")
    if not (_whole(shape) and len(shape) <= 64 and _whole(offsets) and len(offsets) == 2):
        raise ValueError(f"the header's shape or place of {name[:80]!r} is not a list of whole numbers")
    return Place(name, DTYPES[code], tuple(shape), offsets[0], offsets[1], kind)


def _whole(numbers: Any) -> bool:
    return type(numbers) is list and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
