"""How values and functions are captured: a handler for each type gives the node of the key and notes its reads."""

from __future__ import annotations

import array
import collections
import functools
import hashlib
import importlib.util
import operator
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kaun._loss.code import CodeInfo, code_info, refuse_assignments
from kaun._loss.key import ARRAY, EMPTY, ByContent, Held, KeyNode
from kaun._loss.origin import is_library, is_library_type
from kaun._loss.reads import EMPTY_CELL, function_reads, transparent
from kaun._loss.walk import Handler, RefusedError, Walk

__all__ = ["VALUES", "classify_value", "dict_parts", "home_of", "refuse", "set_parts"]


def home_of(loss: Any, depth: int = 3) -> str:
    """The top-level package in which a loss was defined, "" for a library's."""
    for _ in range(9):
        inner = getattr(loss, "func", None) or getattr(loss, "__func__", None) or getattr(loss, "__wrapped__", None)
        if inner is None:
            break
        loss = inner
    if isinstance(loss, types.FunctionType):
        info = code_info(loss)
        if not info.library:
            return info.root
        inside = [v for _, v in function_reads(loss).cells if callable(v)]
        return next(filter(None, (home_of(v, depth - 1) for v in inside)), "") if depth else ""
    kind = loss if isinstance(loss, type) else type(loss)
    return "" if is_library_type(kind) else (kind.__module__ or "").partition(".")[0]


def _plain(walk: Walk, value: Any, at: int) -> KeyNode:
    walk.notes.equal.append((at, value))
    return ("typed", type(value), value)  # True is not 1


def _float(walk: Walk, value: float, at: int) -> KeyNode:
    walk.notes.read_equal(float.hex, at, value.hex())
    return ("float", value.hex())  # by its bits: -0.0 is not 0.0, and nan equals itself


def _complex(walk: Walk, value: complex, at: int) -> KeyNode:
    for part in ("real", "imag"):
        walk.notes.read_equal(float.hex, walk.notes.read(operator.attrgetter(part), at), getattr(value, part).hex())
    return ("complex", value.real.hex(), value.imag.hex())


def _array(walk: Walk, value: Any, at: int) -> KeyNode:
    if not walk.lifts:
        return walk.same(value, at)
    walk.arrays.append(value)
    walk.notes.arrays.append(at)
    return ARRAY


def _numpy(walk: Walk, value: Any, at: int) -> KeyNode:
    if value.dtype.kind not in "biufcV" or value.dtype.fields is not None or isinstance(value, np.ma.MaskedArray):
        kind = "a masked array" if isinstance(value, np.ma.MaskedArray) else f"a NumPy array of dtype {value.dtype}"
        raise RefusedError(
            f"{kind}, which JAX cannot hold. Convert it to numbers before the closure, y = np.asarray(y, np.float32)."
        )
    walk.notes.read_equal(operator.attrgetter("dtype"), at, value.dtype)
    if not walk.lifts:
        content = value.tobytes()
        walk.notes.read_equal(operator.attrgetter("shape"), at, value.shape)
        walk.notes.read_equal(operator.methodcaller("tobytes"), at, content)
        digest = (value.dtype, value.shape, hashlib.blake2b(content, digest_size=16).digest())
        return ("content", ByContent(f"{value.dtype}{list(value.shape)}", digest))
    if type(value) is np.ndarray:
        return _array(walk, value, at)
    # A NumPy scalar, or of a subclass with behaviour of its own.
    return _array(walk, np.array(value), walk.notes.read(np.array, at))


def _tuple(walk: Walk, value: tuple[Any, ...], at: int) -> KeyNode:
    return ("tuple", walk.items(value, at))


def _list(walk: Walk, value: list[Any], at: int) -> KeyNode:
    return walk.met(value, at) or ("list", walk.items(value, at))


def _dict(walk: Walk, value: dict[Any, Any], at: int) -> KeyNode:
    return walk.met(value, at) or ("dict", *dict_parts(walk, value, at))


def dict_parts(walk: Walk, value: dict[Any, Any], at: int) -> tuple[KeyNode, KeyNode]:
    """The nodes of the keys and of the values of a dict."""
    keys = walk.items(tuple(value), walk.notes.read(tuple, at, tuple))
    return keys, tuple([walk.visit(v, operator.itemgetter(k), at) for k, v in value.items()])


def _set(walk: Walk, value: Any, at: int) -> KeyNode:
    again = walk.met(value, at) if type(value) is set else None
    return again or ("set", type(value), set_parts(walk, value, at))


def set_parts(walk: Walk, value: Any, at: int) -> frozenset[KeyNode]:
    """The nodes of the items of a set, which have no order by which they could be read again."""
    if all(type(v) is str for v in value):
        walk.notes.read_equal(frozenset, at, frozenset(value))
        return frozenset([("typed", str, v) for v in value])
    walk.notes.complete = False
    return frozenset([walk.visit(v, operator.itemgetter(0), at) for v in value])


def _slice(walk: Walk, value: slice, at: int) -> KeyNode:
    parts = ("start", "stop", "step")
    return ("slice", tuple([walk.visit(getattr(value, p), operator.attrgetter(p), at) for p in parts]))


def _deque(walk: Walk, value: collections.deque[Any], at: int) -> KeyNode:
    walk.notes.read_equal(operator.attrgetter("maxlen"), at, value.maxlen)
    return walk.met(value, at) or ("deque", value.maxlen, walk.items(value, at))


def _bytes(walk: Walk, value: Any, at: int) -> KeyNode:
    content = bytes(value)
    walk.notes.read_equal(bytes, at, content)
    return ("bytes", type(value), content)


def _numbers(walk: Walk, value: array.array[Any], at: int) -> KeyNode:
    walk.notes.read_equal(operator.attrgetter("typecode"), at, value.typecode)
    walk.notes.read_equal(bytes, at, bytes(value))
    return ("numbers", value.typecode, bytes(value))


def _proxy(walk: Walk, value: Any, at: int) -> KeyNode:
    return ("proxy", walk.visit(dict(value), dict, at))


def _view(walk: Walk, value: Any, at: int) -> KeyNode:
    inside = walk.visit(value.mapping, operator.attrgetter("mapping"), at)
    return ("view", type(value).__name__.removeprefix("dict_"), inside)


def _function(walk: Walk, value: types.FunctionType, at: int) -> KeyNode:
    info = code_info(value)
    notes = walk.notes
    closure = value.__closure__
    if info.library and closure is None:
        notes.identical.append((at, value))
        return ("static", value)
    own = not info.library and (info.root in ("", "__main__", "__mp_main__", walk.home)) and not _is_generated(value)
    if not info.library and info.assigns is not None:
        if own and walk.strict:
            refuse_assignments(value)
        return walk.same(value, at)
    if (again := walk.met(value, at)) is not None:
        return again
    walk.infos[info] = None
    strict, walk.strict = walk.strict, own or (info.library and walk.strict)
    try:
        return _function_parts(walk, value, info, at)
    finally:
        walk.strict = strict


def _is_generated(value: types.FunctionType) -> bool:
    """Whether a decorator wrote a function into the user's module, as beartype does."""
    return value.__code__.co_filename.startswith("<@")


def _function_parts(walk: Walk, value: types.FunctionType, info: CodeInfo, at: int) -> KeyNode:
    notes, reads, get = walk.notes, function_reads(value), operator.attrgetter
    code = notes.read(get("__code__"), at, types.CodeType)
    notes.identical.append((code, info.code))
    closure = notes.read(get("__closure__"), at, type(value.__closure__))
    cells: list[KeyNode] = []
    for i, (name, content) in enumerate(reads.cells):
        if content is EMPTY_CELL:
            notes.complete = False
            cells.append(EMPTY)
            continue
        cell = notes.read(operator.itemgetter(i), closure)
        if name == "__class__" and info.chains.get(name) in (None, {"": None}):
            # For super(); what the class gives is walked with the object.
            cells.append(walk.same(content, notes.read(get("cell_contents"), cell)))
            continue
        cells.append(walk.visit(content, get("cell_contents"), cell, info.chains.get(name)))
    defaults = walk.visit(value.__defaults__, get("__defaults__"), at)
    keywords = walk.visit(value.__kwdefaults__, get("__kwdefaults__"), at)
    scope = notes.read(get("__globals__"), at, dict)
    if info.library:
        held = Held(value.__globals__)
        notes.identical.append((scope, value.__globals__))
        return ("function", info, walk.strict, held, tuple(cells), defaults, keywords, (), (), ())
    absent = frozenset(info.global_names) - value.__globals__.keys()
    if absent:  # names of built-in functions, unless one is hidden by a global from now on
        keys = notes.read(operator.methodcaller("keys"), scope)
        notes.read_equal(operator.methodcaller("isdisjoint", absent), keys, True)
    outside = tuple([(n, walk.visit(v, operator.itemgetter(n), scope, info.chains.get(n))) for n, v in reads.outside])
    module = str(value.__globals__.get("__name__") or "")
    attributes = _function_attributes(walk, value, at)
    imports = _imports(walk, info, value.__globals__) if info.imports else ()
    return (
        "function", info, walk.strict, module, tuple(cells), defaults, keywords, outside, attributes, imports
    )  # fmt: skip


def _function_attributes(walk: Walk, value: types.FunctionType, at: int) -> KeyNode:
    walk.asked = True
    held = {n: v for n, v in value.__dict__.items() if n in walk.names and n != "__wrapped__"}
    scope = walk.notes.read(operator.attrgetter("__dict__"), at, dict) if held else 0
    return tuple([(n, walk.visit(v, operator.itemgetter(n), scope)) for n, v in held.items()])


def _imports(walk: Walk, info: CodeInfo, scope: Mapping[str, Any]) -> KeyNode:
    """The modules that a function imports when it runs, as far as they are imported already."""
    found: list[tuple[str, KeyNode]] = []
    for name, level in info.imports:
        full = importlib.util.resolve_name("." * level + name, scope.get("__package__") or "") if level else name
        parts = [full.partition(".")[0], full] if "." in full else [full]
        for part in parts:
            if part in sys.modules and not is_library(part) and part not in dict(found):
                walk.notes.complete = False
                found.append((part, walk.visit(sys.modules[part], operator.itemgetter(0), 0)))
    return tuple(found)


def _method(walk: Walk, value: Any, at: int) -> KeyNode:
    function, owner = operator.attrgetter("__func__"), operator.attrgetter("__self__")
    return ("method", walk.visit(function(value), function, at), walk.visit(owner(value), owner, at))


def _builtin(walk: Walk, value: Any, at: int) -> KeyNode:
    owner = getattr(value, "__self__", None)
    if owner is None or isinstance(owner, types.ModuleType):
        walk.notes.identical.append((at, value))
        return ("static", value)
    walk.notes.read_equal(operator.attrgetter("__name__"), at, value.__name__)
    return ("bound", value.__name__, walk.visit(owner, operator.attrgetter("__self__"), at))  # [].append, array.sum


def _partial(walk: Walk, value: functools.partial[Any], at: int) -> KeyNode:
    parts = [walk.visit(getattr(value, p), operator.attrgetter(p), at) for p in ("func", "args", "keywords")]
    return ("partial", *parts)


def _transparent(walk: Walk, value: Any, at: int) -> KeyNode:
    # A jitted function would hold its captured arrays as constants; the function under it is compiled with the step.
    inside = value.__wrapped__
    if isinstance(inside, types.FunctionType) and inside.__closure__ is None and code_info(inside).library:
        return walk.same(value, at)
    return walk.visit(inside, operator.attrgetter("__wrapped__"), at)


def refuse(reason: str) -> Handler:
    """A handler that refuses, for a reason."""

    def handler(walk: Walk, value: Any, at: int) -> KeyNode:
        raise RefusedError(f"a {type(value).__name__}, {reason}")

    return handler


_refuse_iterator = refuse(
    "an iterator: a compiled loss would take one value when it is traced and use it forever. Take the value "
    "outside, y = next(it), and capture y, or make it part of the data: data.map(lambda x: (x, loss))."
)
_refuse_random = refuse(
    "a random generator: a compiled loss would draw once when it is traced and use those numbers forever. Draw with "
    "JAX inside the loss, jax.random.normal(kaun.rng.next_key(), shape)."
)

VALUES: dict[type, Handler] = {
    **dict.fromkeys((bool, int, str, bytes, type(None), type(...), type(NotImplemented), range), _plain),
    float: _float,
    complex: _complex,
    np.ndarray: _numpy,
    tuple: _tuple,
    list: _list,
    dict: _dict,
    set: _set,
    frozenset: _set,
    slice: _slice,
    collections.deque: _deque,
    bytearray: _bytes,
    memoryview: _bytes,
    array.array: _numbers,
    types.MappingProxyType: _proxy,
    **dict.fromkeys((type({}.keys()), type({}.values()), type({}.items())), _view),
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _builtin,
    functools.partial: _partial,
}


def classify_value(kind: type, value: Any) -> Handler | None:
    """The handler of an array, a function, or what is refused; None for an object."""
    if isinstance(value, jax.Array):
        return _array
    if issubclass(kind, (np.ndarray, np.generic)):
        return _numpy
    if issubclass(kind, np.dtype):
        return _plain
    if issubclass(kind, (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)):
        return _refuse_random
    if issubclass(kind, Iterator):
        return _refuse_iterator
    if transparent(value):
        return _transparent
    if callable(value) and isinstance(getattr(value, "__func__", None), types.FunctionType):
        return _method  # a bound method of a library's own making
    return None
