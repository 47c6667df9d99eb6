"""JSON as the files of a checkpoint hold it: bounded in size and depth, no key twice, no NaN, and back as it was."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["DEPTH", "LARGEST", "dumps", "loads"]

LARGEST = 16 << 20
DEPTH = 64
_INNER = DEPTH - 4  # what is dumped becomes a part of something that is loaded
_LARGEST_INT = 2**256
# A string, or a bracket outside of one. A string that does not end is taken to the end of the text, whatever is in it:
# no place is looked at twice, so that the time is linear.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*\\?(?:"|\Z)|[\[\]{}]', re.DOTALL)


def dumps(value: Any, name: str) -> str:
    """A value as JSON from which ``loads`` makes the same value again.

    Arguments:
        value: None, bool, int below 2**256, finite float, str; dicts with str keys and lists of these, at
            most 60 in each other.
        name: what the value is called in messages.

    Raises:
        TypeError: for any other type, which would come back as something else: a tuple as a list, say.
        ValueError: for a number that is not finite or too long, and for more than 60 containers in each other.
    """
    _check(value, name, 0)
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _check(value: Any, name: str, depth: int) -> None:
    if depth > _INNER:
        raise ValueError(f"{name[:80]} is more than {_INNER} containers deep. Make it flatter.")
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
                f"{name} is an int of {value.bit_length()} bits; at most 256 are stored. Write hex(value)."
            )
    elif value is not None and kind is not bool and kind is not str:
        raise TypeError(
            f"{name} is a {kind.__name__}, which would not come back from JSON as it is. Write a dict, list, str, int, "
            "float, bool or None."
        )


def loads(raw: bytes, largest: int = LARGEST) -> Any:
    """The value of a JSON text that nobody vouches for.

    Raises:
        ValueError: for anything but one JSON value of at most ``largest`` bytes and 64 containers in each other, with
            no key twice in one object and only finite numbers.
    """
    if len(raw) > largest:
        raise ValueError(f"JSON of {len(raw)} bytes, at most {largest} are read")
    text = raw.decode()
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEPTH:
            raise ValueError(f"JSON of more than {DEPTH} containers in each other")
    return json.loads(
        text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float, parse_int=_int
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"JSON with the key {twice!r} twice in one object")
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
