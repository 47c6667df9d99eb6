"""The handlers of objects, classes and modules: by the attributes that the code reads, and not as they are."""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
from collections.abc import Iterable
from typing import Any, cast

import jax
import numpy as np

from kaun._jax import children_of
from kaun._loss.code import (
    ALL_NAMES,
    CONSTRUCTORS,
    PAYLOADS,
    Chains,
    function_in,
    instance_reads,
    is_namespace,
    is_transparent,
    members_of,
    module_reads,
    names_read_of_class,
    own_classes,
    reads_all,
    slots_of,
)  # fmt: skip
from kaun._loss.origin import HEAP_TYPE, is_library, is_library_type
from kaun._loss.values import VALUES, classify_value, refuse, static
from kaun._loss.walk import ByIdentity, Getter, Handler, KeyNode, RefusedError, Walk

__all__ = ["HANDLERS", "classify"]

_MOST_TYPES = 4096
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic)
_KEEPS_ITS_STATE_IN_PYTHON = (collections.UserDict, collections.UserList, collections.ChainMap)
_SOLID = (object, types.SimpleNamespace, collections.OrderedDict, collections.defaultdict, *PAYLOADS)
_IMMUTABLE = (frozenset, tuple, str, int, float, bytes)


def _object(walk: Walk, value: Any, at: int) -> KeyNode:
    kind = type(value)
    payload = next((base for base in PAYLOADS if issubclass(kind, base)), None)
    # A tuple is made after its items: nothing in it can refer to it by its number.
    if payload not in _IMMUTABLE and (again := walk.met(value, at)) is not None:
        return again
    _refuse_unreadable(kind)
    content = walk.visit(payload(value), payload, at) if payload else ()
    attributes = _attributes(walk, value, at)
    seen = {name for name, _ in attributes}
    fills = hasattr(value, "__dict__") and not walk.names & ALL_NAMES  # else its attributes would be more than its own
    taken, rest = _members(walk, kind, walk.read(type, at), seen if fills else None)
    return ("object", ByIdentity(kind), payload, content, attributes, taken, rest, walk.strict)


def _refuse_unreadable(kind: type) -> None:
    computes = [n for n in ("__getattr__", "__getattribute__") if any(n in vars(base) for base in own_classes(kind))]
    if computes and not issubclass(kind, dict):
        raise RefusedError(
            f"a {kind.__name__}, whose attributes are computed by `{computes[0]}` when they are read. Read them before "
            "the closure, weight = config.weight, and capture weight."
        )
    solid = next(base for base in kind.__mro__ if not base.__flags__ & HEAP_TYPE)
    places = len(slots_of(kind)) + 2  # a dict and weak references
    hidden = solid is object and kind.__basicsize__ > object.__basicsize__ + places * tuple.__itemsize__
    if hidden or solid not in _SOLID:
        raise RefusedError(
            f"a {kind.__name__}, which does not keep its state in `__dict__` or slots, so kaun cannot read it. Read "
            "what the loss needs before the closure, weight = config.weight, and capture weight."
        )


def _attributes(walk: Walk, value: Any, at: int) -> KeyNode:
    found = instance_reads(value, walk.names)
    slots = slots_of(type(value))
    scope = 0
    if isinstance(getattr(value, "__dict__", None), dict):
        held = value.__dict__
        scope = walk.read(operator.attrgetter("__dict__"), at, dict)
        present = frozenset(n for n, _ in found) & held.keys()
        if reads_all(type(value), walk.names):
            walk.read_equal(frozenset, scope, frozenset(held))
        else:
            walk.read_present(scope, walk.names | present, present)
    nodes: list[tuple[str, KeyNode]] = []
    for name, content in found:
        get, parent = (operator.attrgetter(name), at) if name in slots else (operator.itemgetter(name), scope)
        nodes.append((name, _attribute(walk, content, get, parent)))
    if len(slots) > sum(name in slots for name, _ in found):
        walk.complete = False  # a slot that is not filled, or not named
    return tuple(nodes)


def _attribute(walk: Walk, value: Any, get: Getter, parent: int, chains: Chains | None = None) -> KeyNode:
    """The node of an attribute. One that cannot be captured is refused where it is used, not where it is there."""
    mark = walk.mark()
    try:
        return walk.visit(value, get, parent, chains)
    except RefusedError as refused:
        walk.back_to(mark)
        walk.same(type(value), walk.read(type, walk.read(get, parent)))
        walk.complete = walk.complete and not isinstance(value, (np.ndarray, np.generic))  # another dtype may be fine
        return ("refused", str(refused))


def _members(walk: Walk, kind: type, at: int, seen: set[str] | None) -> tuple[KeyNode, KeyNode]:
    """What the classes of an object give to it: what its stand-in takes over, and what is used where it is.

    The second is not made again: arrays in it are compared by content.

    Args:
        walk: The walk.
        kind: The class of the object.
        at: The number of the class.
        seen: The names that the object holds itself; None where its stand-in can hold no more.
    """
    taken: list[tuple[str, str, KeyNode]] = []
    rest: list[tuple[str, KeyNode]] = []
    names = walk.names
    if seen is None and names & ALL_NAMES:  # vars(Config)[name]
        names = names.union(*[vars(base) for base in own_classes(kind)]) - {"__annotations__", "__doc__"}
    of_class = names_read_of_class(kind, names)
    if seen is None or of_class >= names:  # code may call the class
        names |= CONSTRUCTORS
    entries = members_of(kind, names)
    for base in own_classes(kind):
        mine = [(name, entry) for of, name, entry in entries if of is base]
        scope = _class_scope(walk, kind, base, at, [name for name, _ in mine])
        for name, entry in mine:
            function, path = function_in(entry) if type(entry) is not functools.partialmethod else (entry, "")
            read = _entry(walk, name, entry, path, scope)
            how, special = _how(entry, function), name.startswith("__")
            takes = seen is not None and name not in seen and how and not special
            if seen is not None and takes:
                seen.add(name)
                taken.append((name, how, _attribute(walk, function, *read)))
            if not takes or name in of_class:
                computes = seen is not None and not how and not special  # a property that the code names
                with walk.mode(strict=walk.strict and computes, lifts=False):
                    rest.append((name, walk.visit(function, *read)))
    return tuple(taken), tuple(rest)


def _class_scope(walk: Walk, kind: type, base: type, at: int, present: Iterable[str]) -> int:
    """Note the namespace of a class in the order of lookup, and that no other name is there."""
    mro = walk.read(operator.attrgetter("__mro__"), at, tuple)
    found = walk.read(operator.itemgetter(kind.__mro__.index(base)), mro)
    walk.same(base, found)
    scope = walk.read(operator.attrgetter("__dict__"), found, types.MappingProxyType)
    walk.read_equal(len, scope, len(vars(base)))
    names = walk.names.union(present) - {"__dict__", "__module__"}
    walk.read_present(scope, names, names & vars(base).keys())
    return scope


def _entry(walk: Walk, name: str, entry: Any, path: str, scope: int) -> tuple[Getter, int]:
    """How the function behind an entry of a class is read, and of what."""
    if not path:
        return operator.itemgetter(name), scope
    at = walk.read(operator.itemgetter(name), scope)
    walk.same(type(entry), walk.read(type, at))
    return operator.attrgetter(path), at


def _how(entry: Any, function: Any) -> str:
    """How a stand-in holds an entry of a class: bound to it, to the class, or as it is; "" if it stays in the class."""
    if isinstance(entry, classmethod):
        return "class"
    if isinstance(entry, (types.FunctionType, staticmethod)) or is_transparent(entry):
        is_function = isinstance(function, types.FunctionType)
        return ("static" if isinstance(entry, staticmethod) else "bound") if is_function else ""
    return "" if hasattr(type(entry), "__get__") else "static"


def _class(walk: Walk, value: type, at: int) -> KeyNode:
    if is_library_type(value):
        return static(walk, value, at)
    chains = walk.chains
    if "" not in chains and is_library_type(type(value)) and (found := _settings(walk, value, chains, at)) is not None:
        return ("module", value.__qualname__, False, found, walk.strict)
    if (again := walk.met(value, at)) is not None:
        return again
    rest = _members(walk, value, at, None)[1]
    rest += _members(walk, type(value), walk.read(type, at), None)[1]  # of a metaclass
    return ("class", walk.same(value, at)[1], rest, walk.strict)


def _settings(walk: Walk, kind: type, chains: Chains, at: int) -> KeyNode | None:
    """What code reads of a class of which it uses nothing but attributes; None where they are computed."""
    own, entries = own_classes(kind), list[tuple[type, str, Any]]()
    for name in chains:
        base = next((base for base in own if name in vars(base)), None)
        if base is None or isinstance(entry := vars(base)[name], classmethod) or not _how(entry, function_in(entry)[0]):
            return None
        entries.append((base, name, entry))
    scopes = {base: _class_scope(walk, kind, base, at, chains) for base in own}
    found: list[tuple[str, KeyNode]] = []
    for base, name, entry in entries:
        function, path = function_in(entry)
        found.append((name, _attribute(walk, function, *_entry(walk, name, entry, path, scopes[base]), chains[name])))
    return tuple(found)


def _enum(walk: Walk, value: Any, at: int) -> KeyNode:
    if (again := walk.met(value, at)) is not None:
        return again
    rest = _members(walk, type(value), walk.read(type, at), None)[1]
    with walk.mode(strict=False, lifts=False):
        return ("enum", walk.same(value, at)[1], rest + _attributes(walk, value, at))


def _module(walk: Walk, value: types.ModuleType, at: int) -> KeyNode:
    chains = walk.chains
    if is_library(value.__name__):
        return static(walk, value, at)
    whole = "" in chains
    if whole and (again := walk.met(value, at)) is not None:
        return again
    held, reads = vars(value), module_reads(value, chains, walk.names)
    present = frozenset(n for n, _ in reads)
    names = (frozenset(chains) - {""}) | present | (walk.names if whole else frozenset())
    walk.read_equal(operator.attrgetter("__name__"), at, value.__name__)
    scope = walk.read(operator.attrgetter("__dict__"), at, dict)
    walk.read_present(scope, names, present)
    found = [(n, _attribute(walk, v, operator.itemgetter(n), scope, chains.get(n))) for n, v in reads]
    if "__getattr__" in held:  # attributes that the module computes
        found += [(n, _computed(walk, value, n, at)) for n in sorted(names - present) if n in chains]
    return ("module", value.__name__, whole, tuple(found), walk.strict)


def _computed(walk: Walk, module: types.ModuleType, name: str, at: int) -> KeyNode:
    root = module.__name__.partition(".")[0]
    if root in ("", "__main__", walk.home):
        return (
            "refused",
            f"an attribute that is computed by `__getattr__` of module {module.__name__}. Read it before the closure, "
            f"{name} = {root}.{name}, and capture {name}.",
        )
    return _attribute(walk, getattr(module, name), operator.attrgetter(name), at)


def _exception(walk: Walk, value: Any, at: int) -> KeyNode:
    """An exception arrives as the object that the loss raises; reading its arguments is refused, they are not seen."""
    return (_object if "args" in walk.names else _library_object)(walk, value, at)


def _library_object(walk: Walk, value: Any, at: int) -> KeyNode:
    """An object of a library: by identity, with those plain attributes that the code names, and functions in it."""
    held = getattr(value, "__dict__", None)
    node = walk.same(value, at)
    if not isinstance(held, dict):
        return node
    scope = walk.read(operator.attrgetter("__dict__"), at, dict)
    present = walk.names & held.keys()
    walk.read_present(scope, walk.names, present)
    found: list[tuple[str, KeyNode]] = []
    for name, content in sorted(cast("dict[str, Any]", held).items()):
        function = callable(value) and isinstance(content, types.FunctionType)
        if function or (name in present and _is_plain(content)):
            with walk.mode(strict=False, lifts=False):
                found.append((name, walk.visit(content, operator.itemgetter(name), scope)))
        elif name in present:
            walk.same(type(content), walk.read(type, walk.read(operator.itemgetter(name), scope)))
    return ("library", node[1], tuple(found))


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, cast("tuple[Any, ...]", value)))
    return isinstance(value, (*_PLAIN, jax.Array))


def _pytree(walk: Walk, value: Any, at: int) -> KeyNode:
    leaves, treedef = _one_level(value)
    flat = walk.read(_one_level, at, tuple)
    walk.read_equal(operator.itemgetter(1), flat, treedef)
    nodes = walk.items(leaves, walk.read(operator.itemgetter(0), flat, list))
    if is_library_type(type(value)):
        return ("pytree", treedef, nodes, ())
    rest = _members(walk, type(value), walk.read(type, at), None)[1]
    with walk.mode(strict=False, lifts=False):  # its static part may hold objects that change without being unequal
        return ("pytree", treedef, nodes, (*rest, ("static part", walk.visit(_static_part(value), _static_part, at))))


def _one_level(value: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(value, is_leaf=lambda inside: inside is not value)


def _static_part(value: Any) -> Any:
    found = children_of(value)
    return found[1] if found else None


_refuse_foreign = refuse(
    "an array of another library, which a compiled loss would hold as a constant. Convert it before the closure, "
    "y = np.asarray(y)."
)

HANDLERS: dict[type, Handler] = {**VALUES, type: _class, types.ModuleType: _module}
"""By type, of Python and of libraries: those stay for as long as the process."""


def classify(value: Any) -> Handler:
    """The handler for a type met for the first time, or of a user's class."""
    kind = type(value)
    handler = classify_value(kind, value) or _of_object(kind, value)
    if is_library_type(kind) and len(HANDLERS) < _MOST_TYPES and "<locals>" not in kind.__qualname__:
        HANDLERS[kind] = handler
    return handler


def _of_object(kind: type, value: Any) -> Handler:
    if issubclass(kind, type):
        return _class
    if issubclass(kind, types.ModuleType):
        return _module
    if issubclass(kind, enum.Enum):
        return _enum
    if issubclass(kind, BaseException):
        return _exception
    if issubclass(kind, (list, dict, set, frozenset, tuple)):
        return _object  # not as a pytree, which sorts keys; a named tuple too
    if jax.tree_util.tree_structure(value) != jax.tree_util.tree_structure(0):
        return _pytree
    if hasattr(kind, "__array__") or hasattr(kind, "__jax_array__"):
        return _refuse_foreign
    if not is_library_type(kind) or is_namespace(kind) or issubclass(kind, _KEEPS_ITS_STATE_IN_PYTHON):
        return _object
    return _library_object
