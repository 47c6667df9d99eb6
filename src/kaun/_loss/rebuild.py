"""The key of a closure made into a callable again, around given arrays; and a key told in words.

A key is a tree of tuples; the first element of each says how that part is made again (``_REBUILD``, at the end).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from kaun._loss.code import ByIdentity, CodeInfo

__all__ = [
    "ARRAY",
    "EMPTY",
    "ByContent",
    "KeyNode",
    "Rebuilt",
    "parts",
]

KeyNode = tuple[Any, ...]
ARRAY: KeyNode = ("array",)
EMPTY: KeyNode = ("empty",)


class ByContent:
    """A NumPy array as a static value: equal to those of equal dtype, shape and bytes."""

    __slots__ = ("digest", "value")

    def __init__(self, value: Any, digest: bytes) -> None:
        self.value = value
        self.digest = (value.dtype, value.shape, digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return type(other) is ByContent and other.digest == self.digest


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

    def make(self, token: KeyNode) -> Any:
        return _REBUILD[token[0]](self, *token[1:])

    def many(self, tokens: Iterable[KeyNode]) -> list[Any]:
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

    def list_(self, items: KeyNode) -> list[Any]:
        made: list[Any] = self.keep([])
        made.extend(self.many(items))
        self.watch(made)
        return made

    def dict_(self, keys: KeyNode, values: KeyNode) -> dict[Any, Any]:
        made: dict[Any, Any] = self.keep({})
        made.update(zip(self.many(keys), self.many(values), strict=True))
        self.watch(made)
        return made

    def object_(self, same: ByIdentity) -> Any:
        value = self.keep(same.value)
        if isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, types.ModuleType):
            self.watch(value.__dict__)
        return value

    def function_(
        self, plan: CodeInfo, names: ByIdentity, cells: KeyNode, defaults: KeyNode, keywords: KeyNode, outside: KeyNode
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

    def dataclass_(self, kind: type, names: tuple[str, ...], values: KeyNode) -> Any:
        made = self.keep(object.__new__(kind))
        for name, token in zip(names, values, strict=True):
            object.__setattr__(made, name, self.make(token))
        if isinstance(getattr(made, "__dict__", None), dict):
            self.watch(made.__dict__)
        return made

    def partial_(self, function: KeyNode, args: KeyNode, keys: tuple[str, ...], values: KeyNode) -> Any:
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
