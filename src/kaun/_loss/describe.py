"""A key in words: for error messages, and to say why something was compiled again."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kaun import tree
from kaun._loss.code import CodeInfo
from kaun._loss.walk import KeyNode, LossKey

__all__ = ["array_names", "captures", "subject"]


def captures(key: LossKey, arrays: Iterable[Any]) -> dict[str, str]:
    """What a closure captures, in words, by name: arrays as dtype and shape, static values as they print."""
    return _captures(key, arrays, tree.describe)


def array_names(key: LossKey, count: int) -> list[str]:
    """The names of the arrays that a closure captures, ``count`` of them, in their order."""
    numbers = _captures(key, range(count), lambda number: number)
    names = {number: name for name, number in numbers.items() if isinstance(number, int)}
    return [names.get(i, "an array") for i in range(count)]


def _captures(key: LossKey, arrays: Iterable[Any], text: Callable[[Any], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _describe(key.node, "", iter(arrays), found, text)
    return found


def _describe(
    node: KeyNode, name: str, arrays: Iterator[Any], found: dict[str, Any], text: Callable[[Any], Any]
) -> None:
    parts = list(_parts(node, name))
    for part, inner in parts:
        _describe(inner, part, arrays, found, text)
    match node:
        case ("array",):
            found[name] = text(next(arrays))
        case ("tuple" | "list" as kind, items):
            found[f"{name} ({kind})"] = str(len(items))
        case ("pytree", treedef, *_):
            found[f"{name} (pytree)"] = str(treedef)
        case ("frozen", inner_key, count):
            inside = _captures(inner_key, [next(arrays) for _ in range(count)], text)
            found.update({f"{name}.{k}" if name and k else name + k: v for k, v in inside.items()})
        case ("object", same, *_) if not parts:
            found[name] = f"{same.text.partition(' ')[2] or same.text} object"
        case ("same" | "class" | "enum" | "library", same, *_):
            found[name] = _plain(node)
        case _ if not parts and node:
            found[name] = _plain(node)
        case _:
            pass


def _parts(node: KeyNode, name: str) -> Iterator[tuple[str, KeyNode]]:
    """The nodes inside a node with their names, in the order in which their arrays come."""
    below = f"{name}." if name else ""
    match node:
        case ("function", _, _, _, *parts):
            yield from ((below + n, v) for part in parts for n, v in part)
        case ("dict", keys, values):
            yield from ((f"{name}[{_plain(k)}]", v) for k, v in zip(keys, values, strict=True))
        case ("tuple" | "list", items) | ("deque" | "pytree", _, items, *_):
            yield from ((f"{name}[{i}]", v) for i, v in enumerate(items))
        case ("object", _, _, content, attributes, members, rest, _):
            yield from [(name, content)] if content else []
            yield from ((f"{name}.{n}", v) for n, *_, v in (*attributes, *members))
            yield from ((f"{name}.__class__.{n}", v) for n, v in rest)
        case ("class" | "enum" | "library", _, found, *_) | ("module", _, _, found, _):
            yield from ((f"{name}.{n}", v) for n, v in found)
        case ("made", _, ("", "args", "keywords"), (function, args, keywords)):  # a partial
            yield name, function
            yield from ((f"{name}({i})", v) for i, v in enumerate(args[1]))
            yield from ((f"{name}({k[2]})", v) for k, v in zip(keywords[1], keywords[2], strict=True))
        case ("made", _, names, parts):
            yield from (((below + n) if n else name, v) for n, v in zip(names, parts, strict=True))
        case ("bound", _, inside):
            yield name, inside
        case _:
            pass


def _plain(node: KeyNode) -> str:
    match node:
        case ("static", value) | ("typed", _, value):
            return repr(value)
        case ("float", value):
            return repr(float.fromhex(value))
        case ("enum", same, *_):
            return repr(same.get())
        case ("same" | "class" | "library", same, *_):
            return same.text
        case ("content", dtype, shape, digest):
            return f"{dtype}{list(shape)} with digest {digest[:8]}"
        case _:
            return str(node[0])


def subject(key: LossKey) -> Any:
    """The function that a key is about, for messages: the user's own code in it, else the library function it uses.

    It captures nothing: it may be kept.
    """
    found = list(_callables(key.node))
    own = [f for mine, f in found if mine]
    return own[0] if own else found[-1][1] if found else None


def _callables(node: Any) -> Iterator[tuple[bool, Any]]:
    match node:
        case CodeInfo():
            yield not node.library, node.stub
        case LossKey():
            yield from _callables(node.node)
        case ("static", types.FunctionType() as function):
            yield False, function
        case tuple():
            for part in node:
                yield from _callables(part)
        case _:
            pass
