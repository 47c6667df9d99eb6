"""The key of a closure made into a callable again, around given arrays; and a key told in words.

A key is a tree of tuples; the first element of each says how that part is made again (``_REBUILD``, at the end).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from kaun import tree
from kaun.bytecode import Plan, Same

__all__ = ["ARRAY", "EMPTY", "Content", "Rebuilt", "Token", "captures", "hidden_arrays", "parts", "subject"]

Token = tuple[Any, ...]
ARRAY: Token = ("array",)
EMPTY: Token = ("empty",)


class Content:
    """A NumPy array as a static value: equal to those of equal dtype, shape and bytes."""

    __slots__ = ("digest", "value")

    def __init__(self, value: Any, digest: bytes) -> None:
        self.value = value
        self.digest = (value.dtype, value.shape, digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return type(other) is Content and other.digest == self.digest


class Rebuilt:
    """A callable around given arrays, and a watch over what it was given to see that it does not write to it.

    Attributes:
        function: the callable.
    """

    def __init__(self, key: Any, arrays: Iterable[Any]) -> None:
        self._arrays = iter(arrays)
        self._made: list[Any] = []
        self._watched: list[tuple[Any, Any]] = []
        self.function: Callable[..., Any] = self.make(key[0])

    def make(self, token: Token) -> Any:
        return _REBUILD[token[0]](self, *token[1:])

    def many(self, tokens: Iterable[Token]) -> list[Any]:
        return [self.make(t) for t in tokens]

    def keep(self, value: Any) -> Any:
        self._made.append(value)
        return value

    def watch(self, contents: Any) -> None:
        self._watched.append((contents, contents.copy()))

    def written(self) -> bool:
        """Whether a captured list, dict or object was written to; if so it is put back as it was."""
        changed = [(now, before) for now, before in self._watched if not _same_items(now, before)]
        for now, before in changed:
            # An object of the user's is not a copy: a traced value must not stay in it.
            now.clear()
            now.extend(before) if isinstance(now, list) else now.update(before)
        return bool(changed)

    def array(self) -> Any:
        return next(self._arrays)

    def again(self, index: int) -> Any:
        return self._made[index]

    def list_(self, items: Token) -> list[Any]:
        made: list[Any] = self.keep([])
        made.extend(self.many(items))
        self.watch(made)
        return made

    def dict_(self, keys: Token, values: Token) -> dict[Any, Any]:
        made: dict[Any, Any] = self.keep({})
        made.update(zip(self.many(keys), self.many(values), strict=True))
        self.watch(made)
        return made

    def object_(self, same: Same) -> Any:
        value = self.keep(same.value)
        if isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, types.ModuleType):
            self.watch(value.__dict__)
        return value

    def function_(
        self, plan: Plan, names: Same, cells: Token, defaults: Token, keywords: Token, outside: Token
    ) -> types.FunctionType:
        closure = tuple([types.CellType() for _ in cells])
        scope: dict[str, Any] = dict(names.value)
        made = types.FunctionType(plan.code, scope, plan.code.co_name, None, closure)
        self.keep(made)
        for cell, token in zip(closure, cells, strict=True):
            if token is not EMPTY:
                cell.cell_contents = self.make(token)
        made.__defaults__ = tuple(self.many(defaults)) or None
        made.__kwdefaults__ = {k: self.make(t) for k, t in keywords} or None
        scope.update((n, self.make(t)) for n, t in outside)
        return made

    def dataclass_(self, kind: type, names: tuple[str, ...], values: Token) -> Any:
        made = self.keep(object.__new__(kind))
        for name, token in zip(names, values, strict=True):
            object.__setattr__(made, name, self.make(token))
        if isinstance(getattr(made, "__dict__", None), dict):
            self.watch(made.__dict__)
        return made

    def partial_(self, function: Token, args: Token, keys: tuple[str, ...], values: Token) -> Any:
        f = self.make(function)
        positional = self.many(args)
        return functools.partial(f, *positional, **dict(zip(keys, self.many(values), strict=True)))

    def frozen_(self, key: Any, count: int) -> Any:
        inner = Rebuilt(key, [next(self._arrays) for _ in range(count)])
        self._watched += inner._watched
        return inner.function


def _same_items(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(k in now and now[k] is v for k, v in before.items())
    return all(a is b for a, b in zip(now, before, strict=True))


_REBUILD: dict[str, Callable[..., Any]] = {
    "array": Rebuilt.array,
    "again": Rebuilt.again,
    "static": lambda made, value: value,
    "typed": lambda made, kind, value: value,
    "same": lambda made, same: same.value,
    "float": lambda made, value: float.fromhex(value),
    "complex": lambda made, real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "tuple": lambda made, items: tuple(made.many(items)),
    "list": Rebuilt.list_,
    "dict": Rebuilt.dict_,
    "set": lambda made, kind, items: kind(made.many(items)),
    "slice": lambda made, parts: slice(*made.many(parts)),
    "object": Rebuilt.object_,
    "function": Rebuilt.function_,
    "method": lambda made, function, owner: types.MethodType(made.make(function), made.make(owner)),
    "bound": lambda made, name, owner: getattr(made.make(owner), name),
    "partial": Rebuilt.partial_,
    "frozen": Rebuilt.frozen_,
    "dataclass": Rebuilt.dataclass_,
    "pytree": lambda made, treedef, leaves: jax.tree_util.tree_unflatten(treedef, made.many(leaves)),
}


def parts(key: Any, arrays: Iterable[Any]) -> Iterator[tuple[str, Any, list[Any]]]:
    """Of a dict of frozen callables, taken apart as one: name, key and arrays of each."""
    _, names, frozen = key[0]
    each = iter(arrays)
    for (*_, name), (_, inner, count) in zip(names, frozen, strict=True):
        yield name, inner, [next(each) for _ in range(count)]


# A key in words: for error messages, and to say why something was compiled again.


def captures(key: Any, arrays: Iterable[Any]) -> dict[str, str]:
    """What a closure captures, in words, by name: arrays as dtype and shape, static values as they print."""
    found: dict[str, str] = {}
    _tell(key[0], "", iter(arrays), found)
    for kind, attributes in key[1]:
        for name, token in attributes:
            _tell(token, f"{kind}.{name}", iter(()), found)
    return found


def _tell(token: Token, name: str, arrays: Iterator[Any], found: dict[str, str]) -> None:
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


def _plain(token: Token) -> str:
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
    elif isinstance(token, (Same, Content)) and tree.is_array(token.value):
        yield token.value


def subject(key: Any) -> Any:
    """The callable that a key is about, for messages: the user's own code in it, else the library function it uses."""
    found = list(_callables(key[0]))
    own = [f for mine, f in found if mine]
    return own[0] if own else found[-1][1] if found else None


def _callables(token: Any) -> Iterator[tuple[bool, Any]]:
    match token:
        case Plan():
            yield token.own, token.stub
        case ("static", types.FunctionType() as function):
            yield False, function
        case ("object" | "dataclass", Same(value=value), *_) | ("object" | "dataclass", value, *_):
            yield True, value if isinstance(value, type) else type(value)
        case tuple():
            for part in token:
                yield from _callables(part)
        case _:
            pass
