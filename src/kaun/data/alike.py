"""Whether the data of several processes are the same: their stages in words, and checksums of their items."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun.data.access import every_stage_of

__all__ = ["checksums", "different_items", "key_text", "stages_in_words"]

_MOST_NAMES = 64


def stages_in_words(data: Any) -> list[str]:
    """The stages with their plain arguments, keys and ends of arrays; functions are compared by the items they make."""
    return [
        f"{stage.name}({', '.join(f'{name}={_plain(value)}' for name, value in stage.given.items())})"
        for stage in every_stage_of(data)
    ]


def _plain(value: Any) -> str:
    if tree.is_key(value):
        return f"key 0x{key_text(value)}"
    if isinstance(value, (tuple, dict, np.ndarray)):
        leaves = jax.tree_util.tree_leaves(value)
        return ", ".join(map(_ends, leaves)) if all(map(tree.is_array, leaves)) else "..."
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "..."


def _ends(array: Any) -> str:
    """An array in words, with a checksum of its first and last row: with ``local`` no process reads all of them."""
    if not isinstance(array, np.ndarray) or not array.size or array.dtype.hasobject:
        return tree.describe(array)
    return f"{tree.describe(array)} {zlib.crc32(array[-1:].tobytes(), zlib.crc32(array[:1].tobytes())):08x}"


def key_text(key: Any) -> str:
    """The words of a typed key."""
    return np.asarray(tree.readable(jax.random.key_data(key))).tobytes().hex()


def checksums(names: Sequence[str], values: Sequence[Any]) -> dict[str, tuple[str, int]]:
    """Type and checksum of each array of an item by name; of an array spread over processes its type alone."""
    pairs = list(zip(names, values, strict=True))[:_MOST_NAMES]
    return {name: (tree.describe(value), _checksum(value)) for name, value in pairs}


def different_items(found: Mapping[int, Mapping[str, Any]]) -> str:
    """In words, how the item of one process differs from that of the first; empty where all are the same."""
    number = min(found)
    for process, items in found.items():
        for name, fact in items.items():
            first = found[number].get(name)
            if first is None or first[0] != fact[0]:
                return f"{name} is {fact[0]} in process {process}, and {first and first[0]} in process {number}"
            if first != fact:
                return f"the {fact[0]} of {name} has other values in process {process} than in process {number}"
    return ""


def _checksum(value: Any) -> int:
    if isinstance(value, jax.Array):
        if not (value.is_fully_addressable or value.is_fully_replicated):
            return 0
        value = jax.random.key_data(value) if tree.is_key(value) else value
    elif not tree.is_array(value):
        return zlib.crc32(repr(value).encode())
    return zlib.crc32(np.ascontiguousarray(value).tobytes())
