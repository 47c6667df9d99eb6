"""A key in words: for error messages, and to say why something was compiled again."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

from kaun import tree
from kaun._loss.code import ByIdentity, CodeInfo
from kaun._loss.rebuild import ByContent, KeyNode


def captures(key: Any, arrays: Iterable[Any]) -> dict[str, str]:
    """What a closure captures, in words, by name: arrays as dtype and shape, static values as they print."""
    found: dict[str, str] = {}
    _tell(key[0], "", iter(arrays), found)
    for kind, attributes in key[1]:
        for name, token in attributes:
            _tell(token, f"{kind}.{name}", iter(()), found)
    return found


def _tell(token: KeyNode, name: str, arrays: Iterator[Any], found: dict[str, str]) -> None:
    match token:
        case ("array",):
            found[name] = tree.describe(next(arrays))
        case ("function", plan, _, cells, defaults, keywords, outside):
            below = f"{name}." if name else ""
            parts = [*zip(plan.code.co_freevars, cells, strict=True)]
            arguments = plan.code.co_varnames[: plan.code.co_argcount]
            parts += zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
            for part, inner in [*parts, *keywords, *outside]:
                _tell(inner, below + part, arrays, found)
        case ("dict", keys, values):
            for k, v in zip(keys, values, strict=True):
                _tell(v, f"{name}[{_plain(k)}]", arrays, found)
        case ("dataclass", _, names, values):
            for n, v in zip(names, values, strict=True):
                _tell(v, f"{name}.{n}", arrays, found)
        case ("tuple" | "list" as kind, items) | ("pytree" as kind, _, items):
            for i, item in enumerate(items):
                _tell(item, f"{name}[{i}]", arrays, found)
            found[f"{name} ({kind})"] = str(len(items) if kind != "pytree" else token[1])
        case ("partial", function, args, keys, values):
            _tell(function, name, arrays, found)
            for k, v in [*((str(i), a) for i, a in enumerate(args)), *zip(keys, values, strict=True)]:
                _tell(v, f"{name}({k})", arrays, found)
        case ("method", function, owner):
            _tell(function, name, arrays, found)
            _tell(owner, f"{name}.self" if name else "self", arrays, found)
        case ("frozen", key, count):
            inner = captures(key, [next(arrays) for _ in range(count)])
            found.update({f"{name}.{k}" if name and k else name + k: v for k, v in inner.items()})
        case _:
            found[name] = _plain(token)


def _plain(token: KeyNode) -> str:
    match token:
        case ("static", value) | ("typed", _, value):
            return repr(value)
        case ("float", value):
            return repr(float.fromhex(value))
        case ("same" | "object", same):
            return f"{type(same.value).__name__} object at {id(same.value):#x}"
        case ("content", content):
            return f"{tree.describe(content.value)} with digest {content.digest[-1].hex()[:8]}"
        case _:
            return str(token[0])


def hidden_arrays(key: Any) -> Iterator[tuple[str, Any]]:
    """The arrays that a loss can reach through objects and that could not be lifted: how they are reached, and they."""
    for kind, attributes in key[1]:
        for name, token in attributes:
            for array in _arrays_in(token):
                yield f"`{name}` of a {kind}", array


def _arrays_in(token: Any) -> Iterator[Any]:
    if isinstance(token, tuple):
        for part in token:
            yield from _arrays_in(part)
    elif isinstance(token, (ByIdentity, ByContent)) and tree.is_array(token.value):
        yield token.value


def subject(key: Any) -> Any:
    """The callable that a key is about, for messages: the user's own code in it, else the library function it uses."""
    found = list(_callables(key[0]))
    own = [f for mine, f in found if mine]
    return own[0] if own else found[-1][1] if found else None


def _callables(token: Any) -> Iterator[tuple[bool, Any]]:
    match token:
        case CodeInfo():
            yield token.own, token.stub
        case ("static", types.FunctionType() as function):
            yield False, function
        case ("object" | "dataclass", ByIdentity(value=value), *_) | ("object" | "dataclass", value, *_):
            yield True, value if isinstance(value, type) else type(value)
        case tuple():
            for part in token:
                yield from _callables(part)
        case _:
            pass
