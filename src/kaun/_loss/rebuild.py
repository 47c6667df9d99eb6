"""The key of a closure made into a callable again, around given arrays.

A key is a tree of tuples; the first element of each says how that part is made again (``_REBUILD``, at the end).
"""

from __future__ import annotations

import builtins
import collections
import functools
import sys
import types
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax

from kaun._loss.code import CodeInfo
from kaun._loss.key import EMPTY, ByIdentity, Held, KeyNode, LossKey
from kaun._loss.watch import Watch

__all__ = ["Rebuilt", "parts", "rebuild_loss"]


def rebuild_loss(key: LossKey, arrays: Iterable[Any]) -> Callable[..., Any]:
    """The callable of a key, around given arrays."""
    return Rebuilt(key, arrays).function


class Rebuilt:
    """A callable around given arrays, and a watch over what it was given to see that it does not write to it.

    Attributes:
        function: the callable.
        watch: what it could write to.
    """

    def __init__(self, key: LossKey, arrays: Iterable[Any]) -> None:
        self._arrays = iter(arrays)
        self._made: list[Any] = []
        self._strict = True
        self.watch = Watch(key.names)
        self._builtins: dict[str, Any] = {**vars(builtins), **self.watch.guards()}
        self.function: Callable[..., Any] = self.make(key.node)

    def make(self, node: KeyNode) -> Any:
        return _REBUILD[node[0]](self, *node[1:])

    def many(self, nodes: Iterable[KeyNode]) -> list[Any]:
        return [self.make(node) for node in nodes]

    def keep(self, value: Any) -> Any:
        """Make a value known by its number, for what refers to it again."""
        self._made.append(value)
        return value

    def array(self) -> Any:
        return next(self._arrays)

    def again(self, index: int) -> Any:
        return self._made[index]

    def list_(self, items: KeyNode) -> list[Any]:
        made: list[Any] = self.keep([])
        made.extend(self.many(items))
        self._watched(made)
        return made

    def dict_(self, keys: KeyNode, values: KeyNode) -> dict[Any, Any]:
        made: dict[Any, Any] = self.keep({})
        made.update(zip(self.many(keys), self.many(values), strict=True))
        self._watched(made)
        return made

    def set_(self, kind: type, items: KeyNode) -> Any:
        if kind is frozenset:
            return frozenset(self.many(items))
        made: set[Any] = self.keep(set())
        made.update(self.many(items))
        self._watched(made)
        return made

    def deque_(self, maxlen: int | None, items: KeyNode) -> Any:
        made: collections.deque[Any] = self.keep(collections.deque(maxlen=maxlen))
        made.extend(self.many(items))
        self._watched(made)
        return made

    def _watched(self, contents: Any) -> None:
        if self._strict:
            self.watch.add(contents)

    def function_(
        self, info: CodeInfo, strict: bool, scope: Held | str, cells: KeyNode, defaults: KeyNode, keywords: KeyNode,
        outside: KeyNode, attributes: KeyNode, imports: KeyNode,
    ) -> types.FunctionType:  # fmt: skip
        before, self._strict = self._strict, strict
        closure = tuple([types.CellType() for _ in cells])
        names: dict[str, Any]
        if isinstance(scope, Held):
            names = scope.value
        else:
            package = getattr(sys.modules.get(scope), "__package__", None)
            names = {"__name__": scope, "__package__": package, "__builtins__": self._builtins}
        made = types.FunctionType(info.code, names, info.code.co_name, None, closure)
        self.keep(made)
        for cell, node in zip(closure, cells, strict=True):
            if node is not EMPTY:
                cell.cell_contents = self.make(node)
        made.__defaults__ = self.make(defaults)
        made.__kwdefaults__ = self.make(keywords)
        for name, node in outside:
            names[name] = self.make(node)
        for name, node in attributes:
            setattr(made, name, self.make(node))
        self._watched(made.__dict__)
        if imports:
            self.watch.modules.update({name: self.make(node) for name, node in imports})
        self._strict = before
        return made

    def object_(
        self, same: ByIdentity, payload: type | None, content: KeyNode, attributes: KeyNode, members: KeyNode,
        rest: KeyNode, strict: bool,
    ) -> Any:  # fmt: skip
        kind = same.value
        made, fill = self._empty(kind, payload, content)
        self.keep(made)
        fill()
        self.watch.stand_in(made, kind.__name__)
        for name, node in attributes:
            self._set(made, kind, name, node, lambda value: value)
        bind: dict[str, Callable[[Any], Any]] = {
            "static": lambda value: value,
            "bound": lambda value: types.MethodType(value, made),
            "class": lambda value: types.MethodType(value, kind),
        }
        for name, how, node in members:
            self._set(made, kind, name, node, bind[how])
        if strict:
            self.watch.add_object(made)
            self.watch.add_class(kind)
        return made

    def _set(self, made: Any, kind: type, name: str, node: KeyNode, bind: Callable[[Any], Any]) -> None:
        if node[0] == "refused":
            self.watch.refuse(made, name, node[1])
        elif isinstance(getattr(kind, name, None), types.MemberDescriptorType):
            object.__setattr__(made, name, bind(self.make(node)))
        else:
            made.__dict__[name] = bind(self.make(node))

    def _empty(self, kind: type, payload: type | None, content: KeyNode) -> tuple[Any, Callable[[], Any]]:
        """An object of a class with nothing in it yet, and what fills in the items of a list or dict."""
        nothing = lambda: None
        if payload is None:
            solid = types.SimpleNamespace if issubclass(kind, types.SimpleNamespace) else object
            return cast("Any", solid).__new__(kind), nothing
        if payload is list:
            made = list.__new__(kind)
            return made, lambda: list.extend(made, self.many(content))
        if payload is dict:
            table = cast("Any", kind).__new__(kind)
            pairs = lambda: zip(self.many(content[0]), self.many(content[1]), strict=True)
            ordered = issubclass(kind, collections.OrderedDict)
            put: Any = collections.OrderedDict.__setitem__ if ordered else dict.__setitem__
            return table, lambda: [put(table, k, v) for k, v in pairs()]
        if payload is set:
            group = cast("Any", kind).__new__(kind)
            return group, lambda: set.update(group, self.many(content[0]))
        inside = self.many(content[0] if payload is frozenset else content) if payload in (tuple, frozenset) else None
        return payload.__new__(kind, self.make(content) if inside is None else inside), nothing

    def class_(self, same: ByIdentity, rest: KeyNode, strict: bool) -> Any:
        kind = self.keep(same.value)
        if strict:
            self.watch.add_class(kind)
            self.watch.add_class(type(kind))
        return kind

    def module_(self, name: str, whole: bool, found: KeyNode, strict: bool) -> types.ModuleType:
        made = types.ModuleType(name)
        if whole:
            self.keep(made)
        self.watch.stand_in(made, f"module {name}")
        for attribute, node in found:
            self._set(made, types.ModuleType, attribute, node, lambda value: value)
        if strict:
            self.watch.add(made.__dict__)
        return made

    def same_(self, same: ByIdentity, *_: KeyNode) -> Any:
        self.watch.add_foreign(same.value)
        return same.value

    def refused(self, reason: str) -> Any:
        raise AssertionError(reason)

    def partial_(self, function: KeyNode, args: KeyNode, keywords: KeyNode) -> Any:
        f, positional = self.make(function), self.make(args)
        return functools.partial(f, *positional, **self.make(keywords))

    def frozen_(self, key: LossKey, count: int) -> Any:
        inner = Rebuilt(key, [next(self._arrays) for _ in range(count)])
        self.watch.include(inner.watch)
        return inner.function


_REBUILD: dict[str, Callable[..., Any]] = {
    "array": Rebuilt.array,
    "again": Rebuilt.again,
    "static": lambda made, value: value,
    "typed": lambda made, kind, value: value,
    "same": Rebuilt.same_,
    "library": Rebuilt.same_,
    "enum": lambda made, same, rest: made.keep(same.value),
    "float": lambda made, value: float.fromhex(value),
    "complex": lambda made, real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "tuple": lambda made, items: tuple(made.many(items)),
    "list": Rebuilt.list_,
    "dict": Rebuilt.dict_,
    "set": Rebuilt.set_,
    "deque": Rebuilt.deque_,
    "bytes": lambda made, kind, value: kind(value),
    "numbers": lambda made, typecode, value: cast("Any", array)(typecode, value),
    "proxy": lambda made, inside: types.MappingProxyType(made.make(inside)),
    "view": lambda made, name, inside: getattr(made.make(inside), name)(),
    "slice": lambda made, parts: slice(*made.many(parts)),
    "object": Rebuilt.object_,
    "class": Rebuilt.class_,
    "module": Rebuilt.module_,
    "function": Rebuilt.function_,
    "method": lambda made, function, owner: types.MethodType(made.make(function), made.make(owner)),
    "bound": lambda made, name, owner: getattr(made.make(owner), name),
    "partial": Rebuilt.partial_,
    "frozen": Rebuilt.frozen_,
    "pytree": lambda made, treedef, leaves, rest: jax.tree_util.tree_unflatten(treedef, made.many(leaves)),
}


def parts(key: LossKey, arrays: Iterable[Any]) -> Iterator[tuple[str, LossKey, list[Any]]]:
    """Of a dict of frozen callables, captured as one: name, key and arrays of each."""
    _, names, frozen = key.node
    each = iter(arrays)
    for (*_, name), (_, inner, count) in zip(names, frozen, strict=True):
        yield name, inner, [next(each) for _ in range(count)]
