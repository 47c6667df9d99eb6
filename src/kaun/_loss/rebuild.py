"""The callable of a key made again, around other arrays.

The first element of each node of the key says how that part is made (``_REBUILD``, at the end). Lists, dicts and
functions are new ones, and an object is replaced by a stand-in: a new object of its class with the attributes that the
code reads. So the user's own objects are not written to. That the loss writes at all is noticed by ``watch``.
"""

from __future__ import annotations

import builtins
import collections
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax

from kaun._loss.code import CodeInfo, own_classes
from kaun._loss.walk import EMPTY, ByIdentity, KeyNode, LossKey
from kaun._loss.watch import Watch, containers_behind

__all__ = ["Rebuilt", "parts", "rebuild_loss"]


def rebuild_loss(key: LossKey, arrays: Iterable[Any]) -> Callable[..., Any]:
    """The callable of a key, around given arrays."""
    return Rebuilt(key, arrays).function


class Rebuilt:
    """A callable around given arrays, and a watch over what it was given to see that it does not write to it.

    Attributes:
        function: The callable.
        watch: What it could write to.
    """

    def __init__(self, key: LossKey, arrays: Iterable[Any]) -> None:
        self.arrays = iter(arrays)
        self.made: list[Any] = []
        self._strict = True
        self._names = key.names
        self.watch = Watch(key.names)
        self._builtins: dict[str, Any] = {**vars(builtins), **self.watch.guards()}
        self.function: Callable[..., Any] = self.make(key.node)

    def make(self, node: KeyNode) -> Any:
        return _REBUILD[node[0]](self, *node[1:])

    def many(self, nodes: Iterable[KeyNode]) -> list[Any]:
        return [self.make(node) for node in nodes]

    def named(self, pairs: Iterable[tuple[str, KeyNode]]) -> dict[str, Any]:
        return {name: self.make(node) for name, node in pairs}

    def keep(self, value: Any) -> Any:
        """Make a value known by its number, for what refers to it again."""
        self.made.append(value)
        return value

    def filled(self, made: Any, items: Callable[[], Any]) -> Any:
        """A list, dict, set or deque with its items, which are made once it is known by its number."""
        self.keep(made)
        made.extend(items()) if hasattr(made, "extend") else made.update(items())
        if self._strict:
            self.watch.add(made)
        return made

    def function_(
        self, info: CodeInfo, strict: bool, scope: ByIdentity | str, cells: KeyNode, defaults: KeyNode,
        keywords: KeyNode, outside: KeyNode, attributes: KeyNode, imports: KeyNode,
    ) -> types.FunctionType:  # fmt: skip
        before, self._strict = self._strict, strict
        closure = tuple([types.CellType() for _ in cells])
        names: dict[str, Any]
        if isinstance(scope, ByIdentity):
            names = scope.get()
        else:
            package = getattr(sys.modules.get(scope), "__package__", None)
            names = {"__name__": scope, "__package__": package, "__builtins__": self._builtins}
        made: Any = self.keep(types.FunctionType(info.code, names, info.code.co_name, None, closure))
        for cell, (_, node) in zip(closure, cells, strict=True):
            if node is not EMPTY:
                cell.cell_contents = self.make(node)
        made.__defaults__ = tuple([self.make(node) for _, node in defaults]) or None
        made.__kwdefaults__ = self.named(keywords) or None
        names.update(self.named(outside))
        made.__dict__.update(self.named(attributes))
        self.watch.modules.update(self.named(imports))
        if strict:
            self.watch.add(made.__dict__)
        self._strict = before
        return made

    def object_(
        self, same: ByIdentity, payload: type | None, content: KeyNode, attributes: KeyNode, members: KeyNode,
        rest: KeyNode, strict: bool,
    ) -> Any:  # fmt: skip
        kind = same.get()
        made = self._empty(kind, payload, content)
        self.watch.stand_in(made, kind.__name__)
        for name, node in attributes:
            self._set(made, kind, name, node)
        for name, how, node in members:
            self._set(made, kind, name, node, how)
        if strict:
            self.watch.add(made)
            self._watch_class(kind)
        return made

    def _set(self, made: Any, kind: type, name: str, node: KeyNode, how: str = "static") -> None:
        if node[0] == "refused":
            self.watch.refuse(made, name, node[1])
            return
        value = self.make(node)
        if how != "static":
            value = types.MethodType(value, made if how == "bound" else kind)
        if isinstance(getattr(kind, name, None), types.MemberDescriptorType):
            object.__setattr__(made, name, value)
        else:
            made.__dict__[name] = value

    def _empty(self, kind: Any, payload: type | None, content: KeyNode) -> Any:
        """An object of a class without attributes, and with the items where it is a kind of list, dict or the like."""
        if payload in (list, dict, set):
            made: Any = self.keep(kind.__new__(kind) if payload is not list else list.__new__(kind))
            items = self.make(content)
            if payload is dict:
                put: Any = collections.OrderedDict if issubclass(kind, collections.OrderedDict) else dict
                for key, value in items.items():
                    put.__setitem__(made, key, value)
            else:
                (list.extend if payload is list else set.update)(made, items)
            return made
        if payload is not None:
            return cast("Any", payload).__new__(kind, self.make(content))
        solid: Any = types.SimpleNamespace if issubclass(kind, types.SimpleNamespace) else object
        return self.keep(solid.__new__(kind))

    def class_(self, same: ByIdentity, rest: KeyNode, strict: bool) -> Any:
        kind = self.keep(same.get())
        if strict:
            self._watch_class(kind)
        return kind

    def _watch_class(self, kind: type) -> None:
        """Watch a class, and the containers to which its code may write. They are used as they are."""
        self.watch.stand_in(kind, f"class {kind.__name__}")
        for each in (kind, type(kind)):
            self.watch.add(*own_classes(each), *containers_behind(each, self._names))

    def module_(self, name: str, whole: bool, found: KeyNode, strict: bool) -> types.ModuleType:
        made = types.ModuleType(name)
        if whole:
            self.keep(made)
        self.watch.stand_in(made, f"module {name}")
        for attribute, node in found:
            self._set(made, types.ModuleType, attribute, node)
        if strict:
            self.watch.add(made.__dict__)
        return made

    def static_(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            self.watch.add_foreign(value)
        return value

    def same_(self, same: ByIdentity, *_: KeyNode) -> Any:
        self.watch.add_foreign(same.get())
        return same.get()

    def frozen_(self, key: LossKey, count: int) -> Any:
        inner = Rebuilt(key, [next(self.arrays) for _ in range(count)])
        self.watch.include(inner.watch)
        return inner.function


_REBUILD: dict[str, Callable[..., Any]] = {
    "array": lambda made: next(made.arrays),
    "again": lambda made, number: made.made[number],
    "static": Rebuilt.static_,
    "typed": lambda made, kind, value: value,
    "same": Rebuilt.same_,
    "library": Rebuilt.same_,
    "enum": lambda made, same, rest: made.keep(same.get()),
    "float": lambda made, value: float.fromhex(value),
    "tuple": lambda made, items: tuple(made.many(items)),
    "list": lambda made, items: made.filled([], lambda: made.many(items)),
    "dict": lambda made, keys, values: made.filled({}, lambda: zip(made.many(keys), made.many(values), strict=True)),
    "set": lambda made, kind, items: (
        made.filled(set(), lambda: made.many(items)) if kind is set else frozenset(made.many(items))
    ),
    "deque": lambda made, maxlen, items: made.filled(collections.deque(maxlen=maxlen), lambda: made.many(items)),
    "made": lambda made, make, names, parts: make(*made.many(parts)),
    "object": Rebuilt.object_,
    "class": Rebuilt.class_,
    "module": Rebuilt.module_,
    "function": Rebuilt.function_,
    "bound": lambda made, name, owner: getattr(made.make(owner), name),
    "frozen": Rebuilt.frozen_,
    "pytree": lambda made, treedef, leaves, rest: jax.tree_util.tree_unflatten(treedef, made.many(leaves)),
}


def parts(key: LossKey, arrays: Iterable[Any]) -> Iterator[tuple[str, LossKey, list[Any]]]:
    """Of a dict of frozen callables, captured as one: name, key and arrays of each."""
    _, names, frozen = key.node
    each = iter(arrays)
    for (*_, name), (_, inner, count) in zip(names, frozen, strict=True):
        yield name, inner, [next(each) for _ in range(count)]
