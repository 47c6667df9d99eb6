"""JSON for the files of a checkpoint: what is written can be read again exactly, and nothing read is trusted.

Size and depth are bounded, and duplicate keys and numbers that are not finite are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from kaun._messages import quoted

__all__ = ["DEPTH", "LARGEST", "TooLarge", "dumps", "load", "loads"]

LARGEST = 16 << 20
DEPTH = 64
_INNER = DEPTH - 4  # a dumped value becomes a part of the text that is loaded
_LARGEST_INT = 2**256
# A string, or a bracket outside of strings. A string without an end matches up to the end of the text, so that no part
# of the text is scanned twice and the time is linear.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*\\?(?:"|\Z)|[\[\]{}]', re.DOTALL)


class TooLarge(ValueError):
    """A JSON text is larger than what is read."""


def dumps(value: Any, name: str) -> str:
    """A value as JSON, from which ``loads`` makes an equal value of the same types.

    Args:
        value: None, bool, int below 2**256, finite float, str; dicts with str keys and lists of these, at
            most 60 levels deep.
        name: What errors call the value.

    Raises:
        TypeError: If a value is of any other type, which would come back as another one (a tuple as a list).
        ValueError: If a number is not finite or is too large, or there are more than 60 levels of containers.
    """
    _check(value, name, 0)
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _check(value: Any, name: str, depth: int) -> None:
    if depth > _INNER:
        raise ValueError(f"{name[:80]} has more than {_INNER} levels of containers. Make it flatter.")
    kind: type = type(value)
    if kind is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{name} has the key {key!r}; JSON keys are str. Write str(key).")
            _check(inner, f"{name}[{key!r}]", depth + 1)
    elif kind is list:
        for i, inner in enumerate(value):
            _check(inner, f"{name}[{i}]", depth + 1)
    elif kind is float:
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value}, which JSON cannot hold. Write None, or an array: np.float64({value})."
            )
    elif kind is int:
        if abs(value) >= _LARGEST_INT:
            raise ValueError(
                f"{name} is an int of {value.bit_length()} bits; at most 256 bits can be stored. Write hex(value)."
            )
    elif value is not None and kind is not bool and kind is not str:
        raise TypeError(
            f"{name} is a {kind.__name__}, which JSON would load as another type. Write a dict, list, str, "
            "int, float, bool or None."
        )


def loads(raw: bytes, largest: int = LARGEST, most: int | None = None) -> Any:
    """The value of a JSON text from a source that is not trusted.

    Args:
        raw: The text.
        largest: How many bytes it may have.
        most: How many strings and brackets, None for any number; each takes up to 100 bytes of memory.

    Raises:
        ValueError: If the text is not one JSON value within these limits and of at most 64 levels of containers,
            without duplicate keys, and with finite numbers only.
    """
    if len(raw) > largest:
        raise TooLarge(f"JSON of {len(raw)} bytes, and at most {largest} are read")
    text = raw.decode()
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(text), start=1):
        if most is not None and count > most:
            raise TooLarge(f"it has more than {most} strings and brackets, and no more are read")
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEPTH:
            raise ValueError(f"JSON of more than {DEPTH} levels of containers")
    return json.loads(
        text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float, parse_int=_int
    )


def load(path: Path, largest: int, most: int | None = None) -> Any:
    """The value of a JSON file from a source that is not trusted; see ``loads``. No more than ``largest`` is read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise TooLarge(f"it has {size} bytes, and at most {largest} are read")
        return loads(file.read(largest + 1), largest, most)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"JSON with the key {quoted(twice)} twice in one object")
    return made


def _refuse_constant(name: str) -> float:
    raise ValueError(f"JSON with the number {name}")


def _float(text: str) -> float:
    if len(text) > 64 or not math.isfinite(float(text)):
        raise ValueError(f"JSON with the number {text[:40]}")
    return float(text)


def _int(text: str) -> int:
    if len(text) > 80:
        raise ValueError(f"JSON with an int of {len(text)} digits")
    return int(text)
