"""The static part of a loss: a tree of tuples, in which objects stand by identity without being kept alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

__all__ = ["ARRAY", "EMPTY", "ByContent", "ByIdentity", "Held", "KeyNode", "LossKey", "by_identity", "loss_key"]

KeyNode = tuple[Any, ...]
ARRAY: KeyNode = ("array",)
EMPTY: KeyNode = ("empty",)


class ByIdentity(weakref.ref[Any]):
    """An object as a static value: equal to no other, not kept alive, and equal to none once the object is gone.

    There is one for each object, so that they compare and hash by their own identity.
    """

    __slots__ = ("text",)
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    text: str

    @property
    def value(self) -> Any:
        """The object, None when it is gone."""
        return self()


class Held:
    """An object as a static value that cannot be referred to weakly, kept alive so that its id is not used again."""

    __slots__ = ("text", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.text = _text(value)

    def __call__(self) -> Any:
        return self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return type(other) is Held and other.value is self.value


class ByContent:
    """A NumPy array as a static value: equal to those of equal dtype, shape and bytes."""

    __slots__ = ("digest", "text")

    def __init__(self, text: str, digest: tuple[Any, ...]) -> None:
        self.text, self.digest = text, digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return type(other) is ByContent and other.digest == self.digest


_identities: dict[int, ByIdentity] = {}


def by_identity(value: Any) -> ByIdentity | Held:
    """The object as a static value by identity: the same one for as long as the object lives."""
    found = _identities.get(id(value))
    if found is not None and found() is value:
        return found
    try:
        made = ByIdentity(value, _Forget(id(value)))
    except TypeError:  # it has no place for weak references, and no attributes in most cases
        return Held(value)
    made.text = _text(value)
    with _lock:
        found = _identities.get(id(value))
        if found is not None and found() is value:
            return found
        _identities[id(value)] = made
        return made


class _Forget:
    __slots__ = ("at",)

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, gone: ByIdentity) -> None:
        if _identities.get(self.at) is gone:
            _identities.pop(self.at, None)


def _text(value: Any) -> str:
    if isinstance(value, type):
        return f"class {value.__qualname__}"
    return f"{type(value).__name__} object at {id(value):#x}"


class LossKey:
    """The static part of a callable. There is one for each, so that keys compare and hash by identity.

    Attributes:
        node: the tree of tuples, of which the callable is made again.
        names: every attribute name in the code.
    """

    __slots__ = ("__weakref__", "names", "node")

    def __init__(self, node: KeyNode, names: frozenset[str]) -> None:
        self.node, self.names = node, names

    def objects(self) -> list[Any]:
        """The objects that are static by identity and still there."""
        return [value for value in (token() for token in _tokens(self.node)) if value is not None]


def _tokens(node: Any) -> Iterator[ByIdentity | Held]:
    if isinstance(node, (tuple, frozenset)):
        for part in node:
            yield from _tokens(part)
    elif isinstance(node, (ByIdentity, Held)):
        yield node
    elif isinstance(node, LossKey):
        yield from _tokens(node.node)


_lock = threading.RLock()
_keys: weakref.WeakValueDictionary[Any, LossKey] = weakref.WeakValueDictionary()


def loss_key(node: KeyNode, names: frozenset[str]) -> LossKey:
    """The key of a tree of tuples: the same one for equal trees, for as long as anybody holds it."""
    with _lock:
        found = _keys.get((node, names))
        if found is None:
            found = _keys[(node, names)] = LossKey(node, names)
        return found
