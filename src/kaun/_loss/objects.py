"""How objects, classes and modules are captured: by the attributes that the code reads, and not as they are."""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from kaun._loss.code import Chains
from kaun._loss.key import KeyNode, by_identity
from kaun._loss.origin import is_library, is_library_type
from kaun._loss.reads import (
    function_in,
    instance_reads,
    is_namespace,
    members_of,
    module_reads,
    reads_all,
    slots_of,
    transparent,
)  # fmt: skip
from kaun._loss.values import VALUES, classify_value, dict_parts, refuse, set_parts
from kaun._loss.walk import Handler, RefusedError, Walk

__all__ = ["HANDLERS", "classify"]

_MOST_TYPES = 4096
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic)
# What a class of the user's may extend, and what of it is walked.
_PAYLOADS: tuple[type, ...] = (list, dict, set, frozenset, tuple, str, int, float, bytes)
_KEEPS_ITS_STATE_IN_PYTHON = (collections.UserDict, collections.UserList, functools.partial)
_SOLID = (object, types.SimpleNamespace, collections.OrderedDict, collections.defaultdict, *_PAYLOADS)
_HEAP_TYPE = 1 << 9


def _object(walk: Walk, value: Any, at: int) -> KeyNode:
    kind = type(value)
    if (again := walk.met(value, at)) is not None:
        return again
    _refuse_unreadable(kind)
    walk.asked = True
    payload = next((base for base in _PAYLOADS if issubclass(kind, base)), None)
    content = _payload(walk, payload, value, at) if payload else ()
    attributes, seen = _attributes(walk, value, at)
    members, rest = _members(walk, kind, walk.notes.read(type, at), seen if hasattr(value, "__dict__") else None)
    return ("object", by_identity(kind), payload, content, attributes, members, rest, walk.strict)


def _refuse_unreadable(kind: type) -> None:
    own = [base for base in kind.__mro__ if not is_library_type(base)]
    computes = [n for n in ("__getattr__", "__getattribute__") if any(n in vars(base) for base in own)]
    if computes and not issubclass(kind, dict):
        raise RefusedError(
            f"a {kind.__name__}, whose attributes are computed by `{computes[0]}` when they are read. Read them before "
            "the closure, weight = config.weight, and capture weight."
        )
    solid = next(base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE)
    places = len(slots_of(kind)) + 2  # a dict and weak references
    hidden = solid is object and kind.__basicsize__ > object.__basicsize__ + places * tuple.__itemsize__
    if hidden or solid not in _SOLID:
        raise RefusedError(
            f"a {kind.__name__}, which does not keep its state in `__dict__` or slots, so kaun cannot read it. Read "
            "what the loss needs before the closure, weight = config.weight, and capture weight."
        )


def _payload(walk: Walk, base: type, value: Any, at: int) -> KeyNode:
    """What a list, dict, string or the like holds of which the class is a kind."""
    if base is dict:
        return dict_parts(walk, dict(cast("dict[Any, Any]", value)), walk.notes.read(dict, at, dict))
    if base in (set, frozenset):
        return (set_parts(walk, value, at),)
    if base in (list, tuple):
        return walk.items(value, at)
    return walk.visit(base(value), base, at)


def _attributes(walk: Walk, value: Any, at: int) -> tuple[KeyNode, frozenset[str]]:
    found = instance_reads(value, walk.names)
    slots = slots_of(type(value))
    scope = 0
    if isinstance(getattr(value, "__dict__", None), dict):
        held = value.__dict__
        scope = walk.notes.read(operator.attrgetter("__dict__"), at, dict)
        present = frozenset(n for n, _ in found) & held.keys()
        if reads_all(type(value), walk.names):
            walk.notes.read_equal(frozenset, scope, frozenset(held))
        else:
            _note_present(walk, scope, walk.names | present, present)
    nodes: list[tuple[str, KeyNode]] = []
    for name, content in found:
        get, parent = (operator.attrgetter(name), at) if name in slots else (operator.itemgetter(name), scope)
        nodes.append((name, _attribute(walk, content, get, parent)))
    if len(slots) > sum(name in slots for name, _ in found):
        walk.notes.complete = False  # a slot that is not filled, or not named
    return tuple(nodes), frozenset(name for name, _ in found)


def _note_present(walk: Walk, scope: int, names: frozenset[str], present: frozenset[str]) -> None:
    """Note that of these names just those that are present stay so."""
    keys = walk.notes.read(operator.methodcaller("keys"), scope)
    walk.notes.read_equal(operator.methodcaller("__and__", names), keys, set(present))


def _attribute(walk: Walk, value: Any, get: Callable[[Any], Any], parent: int, chains: Any = None) -> KeyNode:
    """The node of an attribute. One that cannot be captured is refused where it is used, not where it is there."""
    mark = walk.mark()
    try:
        return walk.visit(value, get, parent, chains)
    except RefusedError as refused:
        walk.back_to(mark)
        at = walk.notes.read(get, parent)
        walk.weak(walk.notes.read(type, at), type(value))
        return ("refused", str(refused))


def _members(
    walk: Walk, kind: type, at: int, seen: frozenset[str] | None, *, makes: bool = False
) -> tuple[KeyNode, KeyNode]:  # fmt: skip
    """What the classes of an object give to it: what its stand-in takes over, and what is used where it is.

    Args:
        seen: the names that the object holds itself; None where its stand-in can hold no more.
        makes: whether the code may make an object of the class.
    """
    taken: list[tuple[str, str, KeyNode]] = []
    rest: list[tuple[str, KeyNode]] = []
    later: list[tuple[str, Any, int, str]] = []
    known = set(seen or ())
    for base, entries in _by_class(kind, walk.names, makes):
        scope = _class_scope(walk, kind, base, at, frozenset(n for n, _ in entries))
        for name, entry in entries:
            function, path = function_in(entry)
            how = _how(entry, function)
            if seen is None or name in known or not how or name.startswith("__"):
                later.append((name, function, scope, path))
                continue
            known.add(name)
            taken.append((name, how, _attribute(walk, function, *_entry(walk, name, path, scope))))
    for name, function, scope, path in later:
        strict = walk.strict and (name in walk.names or name == "__call__")
        rest.append((name, _unlifted(walk, function, *_entry(walk, name, path, scope), strict=strict)))
    return tuple(taken), tuple(rest)


def _by_class(kind: type, names: frozenset[str], makes: bool) -> list[tuple[type, list[tuple[str, Any]]]]:
    found: dict[type, list[tuple[str, Any]]] = {b: [] for b in kind.__mro__ if not is_library_type(b)}
    for base, name, entry in members_of(kind, names, makes=makes):
        found[base].append((name, entry))
    return list(found.items())


def _class_scope(walk: Walk, kind: type, base: type, at: int, present: frozenset[str]) -> int:
    """Note the namespace of a class in the order of lookup, and that no other name is there."""
    notes = walk.notes
    mro = notes.read(operator.attrgetter("__mro__"), at, tuple)
    found = notes.read(operator.itemgetter(kind.__mro__.index(base)), mro)
    walk.weak(found, base)
    scope = notes.read(operator.attrgetter("__dict__"), found, types.MappingProxyType)
    notes.read_equal(len, scope, len(vars(base)))
    names = (walk.names | present) - {"__dict__", "__module__"}
    _note_present(walk, scope, names, names & vars(base).keys())
    return scope


def _entry(walk: Walk, name: str, path: str, scope: int) -> tuple[Callable[[Any], Any], int]:
    """How the function behind an entry of a class is read, and of what."""
    if not path:
        return operator.itemgetter(name), scope
    return operator.attrgetter(path), walk.notes.read(operator.itemgetter(name), scope)


def _how(entry: Any, function: Any) -> str:
    """How a stand-in holds an entry of a class: bound to it, to the class, or as it is; "" if it stays in the class."""
    if isinstance(entry, classmethod):
        return "class"
    if isinstance(entry, (types.FunctionType, staticmethod)) or transparent(entry):
        is_function = isinstance(function, types.FunctionType)
        return ("static" if isinstance(entry, staticmethod) else "bound") if is_function else ""
    return "" if hasattr(type(entry), "__get__") else "static"


def _unlifted(
    walk: Walk, value: Any, get: Callable[[Any], Any], parent: int, *, strict: bool = False
) -> KeyNode:  # fmt: skip
    """The node of a value that is used where it is: in it nothing is lifted.

    Args:
        strict: whether what cannot be followed in it is refused. Nobody knows whether an operator is used.
    """
    mark = walk.mark()
    lifts, walk.lifts = walk.lifts, False
    before, walk.strict = walk.strict, strict
    try:
        return walk.visit(value, get, parent)
    except RefusedError:
        if strict:
            raise
        walk.back_to(mark)
        return ()
    finally:
        walk.lifts, walk.strict = lifts, before


def _class(walk: Walk, value: type, at: int) -> KeyNode:
    if is_library_type(value):
        walk.notes.identical.append((at, value))
        return ("static", value)
    walk.asked = True
    chains = walk.chains
    if "" not in chains and is_library_type(type(value)) and (entries := _settings(value, chains)) is not None:
        return ("module", value.__qualname__, False, _named_members(walk, value, entries, chains, at), walk.strict)
    if (again := walk.met(value, at)) is not None:
        return again
    rest = _members(walk, value, at, None, makes=True)[1]
    rest += _members(walk, type(value), walk.notes.read(type, at), None)[1]  # of a metaclass
    return ("class", walk.same(value, at)[1], rest, walk.strict)


def _settings(kind: type, chains: Chains) -> dict[str, tuple[type, Any]] | None:
    """The entries that code reads of a class of which it uses nothing but attributes; None where they are computed."""
    found: dict[str, tuple[type, Any]] = {}
    for name in chains:
        base = next((base for base in kind.__mro__ if name in vars(base)), object)
        if (
            is_library_type(base)
            or isinstance(entry := vars(base)[name], classmethod)
            or not _how(entry, function_in(entry)[0])
        ):
            return None
        found[name] = base, entry
    return found


def _named_members(
    walk: Walk, kind: type, entries: dict[str, tuple[type, Any]], chains: Chains, at: int
) -> KeyNode:  # fmt: skip
    own = [base for base in kind.__mro__ if not is_library_type(base)]
    scopes = {base: _class_scope(walk, kind, base, at, frozenset(chains)) for base in own}
    found: list[tuple[str, KeyNode]] = []
    for name, (base, entry) in entries.items():
        function, path = function_in(entry)
        get, parent = _entry(walk, name, path, scopes[base])
        found.append((name, _attribute(walk, function, get, parent, chains[name])))
    return tuple(found)


def _enum(walk: Walk, value: Any, at: int) -> KeyNode:
    if (again := walk.met(value, at)) is not None:
        return again
    walk.asked = True
    return ("enum", walk.same(value, at)[1], _members(walk, type(value), walk.notes.read(type, at), None)[1])


def _module(walk: Walk, value: types.ModuleType, at: int) -> KeyNode:
    chains = walk.chains
    if is_library(value.__name__):
        walk.notes.identical.append((at, value))
        return ("static", value)
    whole = "" in chains
    walk.asked = True
    if whole and (again := walk.met(value, at)) is not None:
        return again
    held, reads = vars(value), module_reads(value, chains, walk.names)
    present = frozenset(n for n, _ in reads)
    names = (frozenset(chains) - {""}) | present | (walk.names if whole else frozenset())
    walk.notes.read_equal(operator.attrgetter("__name__"), at, value.__name__)
    scope = walk.notes.read(operator.attrgetter("__dict__"), at, dict)
    _note_present(walk, scope, names, present)
    found: list[tuple[str, KeyNode]] = [
        (n, _attribute(walk, v, operator.itemgetter(n), scope, chains.get(n))) for n, v in reads
    ]
    if "__getattr__" in held:  # attributes that the module computes
        for name in sorted(names - present):
            if name in chains:
                found.append((name, _computed(walk, value, name, at)))
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
    walk.asked = True
    return (_object if "args" in walk.names else _library_object)(walk, value, at)


def _library_object(walk: Walk, value: Any, at: int) -> KeyNode:
    """An object of a library: by identity, with those plain attributes that the code names, and functions in it."""
    walk.asked = True
    held = getattr(value, "__dict__", None)
    node = walk.same(value, at)
    if not isinstance(held, dict) or not held:
        return node
    scope = walk.notes.read(operator.attrgetter("__dict__"), at, dict)
    present = walk.names & held.keys()
    _note_present(walk, scope, walk.names, present)
    found: list[tuple[str, KeyNode]] = []
    for name, content in sorted(cast("dict[str, Any]", held).items()):
        function = callable(value) and isinstance(content, types.FunctionType)
        if function or (name in present and _is_plain(content)):
            found.append((name, _unlifted(walk, content, operator.itemgetter(name), scope)))
        elif name in present:
            walk.weak(walk.notes.read(type, walk.notes.read(operator.itemgetter(name), scope)), type(content))
    return ("library", node[1], tuple(found))


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, cast("tuple[Any, ...]", value)))
    return isinstance(value, (*_PLAIN, jax.Array))


def _pytree(walk: Walk, value: Any, at: int) -> KeyNode:
    leaves, treedef = jax.tree_util.tree_flatten(value)
    flat = walk.notes.read(jax.tree_util.tree_flatten, at, tuple)
    walk.notes.equal.append((walk.notes.read(operator.itemgetter(1), flat, type(treedef)), treedef))
    nodes = walk.items(leaves, walk.notes.read(operator.itemgetter(0), flat, list))
    kind = type(value)
    if is_library_type(kind):
        return ("pytree", treedef, nodes, ())
    walk.asked = True
    return ("pytree", treedef, nodes, _members(walk, kind, walk.notes.read(type, at), None)[1])


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
